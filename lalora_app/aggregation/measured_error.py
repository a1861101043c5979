"""How far the server's product is from the mean of the clients' products.

Products are never formed; all figures are relative to ‖Σ p_k B_k A_k‖_F over all layers, in which
the scale s cancels. A function of what was noised before it was sent: no privacy cost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs
from lalora_app.adapter.low_rank import Float64Array, Product, frobenius_norm, sum_of_products, svd
from lalora_app.aggregation.rule import Aggregated, normalised_weights

SPECTRUM_LENGTH = 4  # singular values


@dataclass(frozen=True)
class AggregationErrors:
    """What a round loses, on one scale.

    Attributes:
        averaging: ‖E‖_F of averaging the factors apart, E = Σ p_k (B_k − B̄)(A_k − Ā); None where
            not both factors travelled, or ranks differ.
        averaging_spectrum: the largest singular values of that E, over all layers.
        remaining: ‖E‖_F of what the method's own rule made of the uploads; None where the
            clients' products are not known to the server.
        remaining_spectrum: the largest singular values of that E.
        cosine: mean cosine between two clients' updates; None for one client or differing ranks.
    """

    averaging: float | None = None
    averaging_spectrum: tuple[float, ...] = ()
    remaining: float | None = None
    remaining_spectrum: tuple[float, ...] = ()
    cosine: float | None = None


def _mean_product(shares: Float64Array, uploads: Sequence[Adapter], b: str, a: str) -> Product:
    return sum_of_products((p, up[b], up[a]) for p, up in zip(shares, uploads, strict=True))


def _mean_product_norm(shares: Float64Array, uploads: Sequence[Adapter]) -> float:
    """Return ‖Σ p_k B_k A_k‖_F."""
    layers = [
        frobenius_norm(_mean_product(shares, uploads, b, a)) for b, a in factor_pairs(uploads[0])
    ]
    return float(np.hypot.reduce(layers))


def _averaging_errors(shares: Float64Array, uploads: Sequence[Adapter]) -> Iterator[Product]:
    """Yield E = Σ p_k (B_k − B̄)(A_k − Ā) of every layer, which does not cancel."""
    for b, a in factor_pairs(uploads[0]):
        means = {
            n: sum(p * up[n].astype(np.float64) for p, up in zip(shares, uploads, strict=True))
            for n in (b, a)
        }
        apart = [{n: up[n] - means[n] for n in (b, a)} for up in uploads]
        yield _mean_product(shares, apart, b, a)


def _remaining_errors(
    shares: Float64Array, uploads: Sequence[Adapter], new: Aggregated
) -> Iterator[Product]:
    """Yield Σ p_k B_k A_k less the new product and what moved into the base, by layer."""
    for b, a in factor_pairs(uploads[0]):
        made = [(-1.0, to[b], to[a]) for to in (new.adapter, new.fold) if b in to]
        yield sum_of_products([(1.0, *_mean_product(shares, uploads, b, a)), *made])


def _relative_norm_and_spectrum(
    errors: Iterator[Product], whole: float
) -> tuple[float, tuple[float, ...]]:
    """Return ‖E‖_F over all layers and the largest singular values, relative to ``whole``."""
    values = np.sort(np.concatenate([svd(error).s for error in errors]))[::-1]
    if whole == 0:
        return 0.0, ()
    return float(np.linalg.norm(values) / whole), tuple(
        map(float, values[:SPECTRUM_LENGTH] / whole)
    )


def _have_equal_shapes(uploads: Sequence[Adapter]) -> bool:
    return all(up[n].shape == uploads[0][n].shape for up in uploads for n in up)


def _has_both_factors(upload: Adapter) -> bool:
    return any(True for _ in factor_pairs(upload)) and all(
        a in upload for _, a in factor_pairs(upload)
    )


def aggregation_error(weights: Sequence[float], uploads: Sequence[Adapter]) -> float | None:
    """Return what averaging the factors apart loses, see :class:`Errors`.

    Args:
        weights: of the clients; p_k are these over their sum.
        uploads: adapters; where they lack one of the factors, nothing can be said of the products.

    Returns:
        0 for one client, or for clients that agree on a factor; None if a factor is missing.
    """
    shares = normalised_weights(weights)
    if not _has_both_factors(uploads[0]) or not _have_equal_shapes(uploads):
        return None
    return _relative_norm_and_spectrum(
        _averaging_errors(shares, uploads), _mean_product_norm(shares, uploads)
    )[0]


def aggregation_errors(
    weights: Sequence[float],
    uploads: Sequence[Adapter],
    before: Adapter,
    new: Aggregated,
    *,
    complete: bool,
) -> AggregationErrors:
    """Measure a round.

    Args:
        weights: of the clients.
        uploads: what travelled, in units of the global scale.
        before: the global adapter that the round started from.
        new: what the method's rule made of it.
        complete: whether uploads and ``before`` together are all that a client computed with.
    """
    shares, alike = normalised_weights(weights), _have_equal_shapes(uploads)
    found = AggregationErrors()
    if alike:
        updates = [{n: up[n] - before[n] for n in up} for up in uploads]
        found = AggregationErrors(cosine=mean_cosine(updates))
    if not complete:
        return found
    whole_uploads = [before | upload for upload in uploads]
    whole = _mean_product_norm(shares, whole_uploads)
    left = _relative_norm_and_spectrum(_remaining_errors(shares, whole_uploads, new), whole)
    apart: tuple[float | None, tuple[float, ...]] = (None, ())
    if alike and _has_both_factors(uploads[0]):
        apart = _relative_norm_and_spectrum(_averaging_errors(shares, uploads), whole)
    return AggregationErrors(apart[0], apart[1], left[0], left[1], found.cosine)


def _flat_rows(name: str, updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return (clients, entries) of one tensor, in float64."""
    shapes = [update[name].shape for update in updates]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name} of {sorted(set(shapes))} must be of one shape in all updates")
    return np.stack([update[name].ravel() for update in updates]).astype(np.float64)


def _gram(updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return (clients, clients) inner products, one tensor at a time: little is copied at once."""
    names = updates[0].keys()
    for client, update in enumerate(updates):
        if update.keys() != names:
            differing = min(update.keys() ^ names)
            raise ValueError(f"update {client} must have the same tensors as update 0: {differing}")
    gram = np.zeros((len(updates), len(updates)))
    for name in names:
        rows = _flat_rows(name, updates)
        gram += rows @ rows.T
    return gram


def update_cosines(updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return (clients, clients): the cosine between every two clients' flattened updates.

    Args:
        updates: of at least one client: upload minus the global tensor, by tensor name.

    Returns:
        A symmetric matrix in [-1, 1] with ones on its diagonal. A zero update has no direction:
        its entries off the diagonal are 0.

    Raises:
        ValueError: if there is no update, or if their tensors differ in name or shape.

    Privacy: a function of what was noised before it was sent; unavailable to a server that sees
        sums only.
    """
    if not updates:
        raise ValueError("cosines of 0 updates: there must be at least 1")
    gram = _gram(updates)
    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = 1.0  # the numerators are zero too
    cosines: np.ndarray = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def mean_cosine(updates: Sequence[Mapping[str, np.ndarray]]) -> float | None:
    """Return the mean cosine over all pairs of different clients; None for one client.

    Args:
        updates: see ``update_cosines``, whose errors and privacy are this one's too.
    """
    cosines = update_cosines(updates)
    pairs = cosines[np.triu_indices(len(cosines), k=1)]
    return float(pairs.mean()) if pairs.size else None
