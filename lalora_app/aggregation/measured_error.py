"""Aggregation errors: distance between the server's product and the mean client product.

Errors are relative to ‖Σ p_k B_k A_k‖_F over all layers, so the LoRA scale s cancels. The (m, n)
products are never formed. Privacy: computed from noised uploads only; no extra cost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs
from lalora_app.adapter.low_rank import (
    Float64Array,
    Product,
    frobenius_norm,
    singular_values,
    sum_of_products,
)
from lalora_app.aggregation.rule import Aggregated, normalised_weights

SPECTRUM_LENGTH = 4  # number of singular values in a spectrum


@dataclass(frozen=True)
class AggregationErrors:
    """The relative errors of one round's aggregation.

    Attributes:
        averaging: relative ‖E‖_F of separate averages of A and B, E = Σ p_k (B_k − B̄)(A_k − Ā);
            None if clients did not upload both factors, or their ranks differ.
        averaging_spectrum: the largest relative singular values of E, over all layers.
        remaining: relative ‖R‖_F for R = Σ p_k B_k A_k minus the product after the method's rule;
            None if the server does not know the clients' products.
        remaining_spectrum: the largest relative singular values of R, over all layers.
        cosine: mean cosine between two clients' updates; None for one client, or if a rank is not
            the run's.
    """

    averaging: float | None = None
    averaging_spectrum: tuple[float, ...] = ()
    remaining: float | None = None
    remaining_spectrum: tuple[float, ...] = ()
    cosine: float | None = None


def _mean_product(shares: Float64Array, uploads: Sequence[Adapter], b: str, a: str) -> Product:
    return sum_of_products((p, up[b], up[a]) for p, up in zip(shares, uploads, strict=True))


def _mean_product_norm(shares: Float64Array, uploads: Sequence[Adapter]) -> float:
    """Return ‖Σ p_k B_k A_k‖_F over all layers."""
    layers = [
        frobenius_norm(_mean_product(shares, uploads, b, a)) for b, a in factor_pairs(uploads[0])
    ]
    return float(np.hypot.reduce(layers))


def _averaging_errors(shares: Float64Array, uploads: Sequence[Adapter]) -> Iterator[Product]:
    """Yield Σ p_k B_k A_k − B̄Ā of every layer as Σ p_k (B_k − B̄)(A_k − Ā): no cancellation."""
    for b, a in factor_pairs(uploads[0]):
        means = {
            n: sum(p * up[n].astype(np.float64) for p, up in zip(shares, uploads, strict=True))
            for n in (b, a)
        }
        deviations = [{n: up[n] - means[n] for n in (b, a)} for up in uploads]
        yield _mean_product(shares, deviations, b, a)


def _remaining_errors(
    shares: Float64Array, uploads: Sequence[Adapter], new: Aggregated
) -> Iterator[Product]:
    """Yield Σ p_k B_k A_k minus the new product and minus the fold into the base, per layer."""
    for b, a in factor_pairs(uploads[0]):
        made = [(-1.0, to[b], to[a]) for to in (new.adapter, new.fold) if b in to]
        yield sum_of_products([(1.0, *_mean_product(shares, uploads, b, a)), *made])


def _relative_norm_and_spectrum(
    errors: Iterator[Product], whole: float
) -> tuple[float, tuple[float, ...]]:
    """Return ‖E‖_F over all layers and the largest singular values, divided by ``whole``.

    Limit: ``whole`` = 0, also for adapters without factors, gives 0.
    """
    if whole == 0:
        return 0.0, ()
    values = np.sort(np.concatenate([singular_values(error) for error in errors]))[::-1]
    return float(np.linalg.norm(values) / whole), tuple(
        map(float, values[:SPECTRUM_LENGTH] / whole)
    )


def _have_equal_shapes(uploads: Sequence[Adapter], like: Adapter) -> bool:
    return all(up[n].shape == like[n].shape for up in uploads for n in up)


def _has_both_factors(upload: Adapter) -> bool:
    return any(True for _ in factor_pairs(upload)) and all(
        a in upload for _, a in factor_pairs(upload)
    )


def aggregation_error(weights: Sequence[float], uploads: Sequence[Adapter]) -> float | None:
    """Return the relative error of separate averages, ``AggregationErrors.averaging``.

    Args:
        weights: one positive weight per client.
        uploads: one adapter per client.

    Returns:
        A number ≥ 0: 0 for one client, or if all clients have the same A or the same B. None if
        the uploads lack a factor or their shapes differ.
    """
    shares = normalised_weights(weights)
    if not _has_both_factors(uploads[0]) or not _have_equal_shapes(uploads, uploads[0]):
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
    """Measure the aggregation errors of one round.

    Args:
        weights: one positive weight per client.
        uploads: one adapter per client, scaled from the client's rank to the run's rank.
        before: the global adapter before the round.
        new: the result of the method's server rule.
        complete: whether ``before`` with the upload is the client's whole adapter; False if
            clients keep a trained factor.
    """
    shares, equal_shapes = normalised_weights(weights), _have_equal_shapes(uploads, uploads[0])
    found = AggregationErrors()
    if _have_equal_shapes(uploads, before):  # else all clients may have one smaller rank
        updates = [{n: up[n] - before[n] for n in up} for up in uploads]
        found = AggregationErrors(cosine=mean_cosine(updates))
    if not complete:
        return found
    whole_uploads = [before | upload for upload in uploads]
    whole = _mean_product_norm(shares, whole_uploads)
    remaining = _relative_norm_and_spectrum(_remaining_errors(shares, whole_uploads, new), whole)
    averaging: tuple[float | None, tuple[float, ...]] = (None, ())
    if equal_shapes and _has_both_factors(uploads[0]):
        averaging = _relative_norm_and_spectrum(_averaging_errors(shares, uploads), whole)
    return AggregationErrors(averaging[0], averaging[1], remaining[0], remaining[1], found.cosine)


def _flat_rows(name: str, updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return (clients, entries) of one tensor, in float64."""
    shapes = [update[name].shape for update in updates]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name} of {sorted(set(shapes))} must be of one shape in all updates")
    return np.stack([update[name].ravel() for update in updates]).astype(np.float64)


def _gram(updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return (clients, clients) inner products, summed tensor by tensor to save memory."""
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
    """Return (clients, clients): the cosine between the flattened updates of every two clients.

    Args:
        updates: one mapping per client, at least one, from tensor name to upload minus global
            tensor.

    Returns:
        A symmetric matrix in [-1, 1] with ones on its diagonal. The cosines of a zero update are 0
        off the diagonal.

    Raises:
        ValueError: if there is no update, or if their tensors differ in name or shape.

    Privacy: computed from noised uploads; no extra cost. Not available under secure aggregation,
    where the server sees a sum only.
    """
    if not updates:
        raise ValueError("cosines of 0 updates: there must be at least 1")
    gram = _gram(updates)
    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = 1.0  # a zero update: its inner products are zero too
    cosines: np.ndarray = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def mean_cosine(updates: Sequence[Mapping[str, np.ndarray]]) -> float | None:
    """Return the mean cosine over all pairs of different clients; None for one client.

    Args:
        updates: one mapping per client, see :func:`update_cosines` for errors and privacy.
    """
    cosines = update_cosines(updates)
    pairs = cosines[np.triu_indices(len(cosines), k=1)]
    return float(pairs.mean()) if pairs.size else None
