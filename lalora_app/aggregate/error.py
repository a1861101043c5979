"""How far the aggregate's product is from the mean of the clients' products."""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter import Adapter


def _product_norm_squared(left: np.ndarray, right: np.ndarray) -> float:
    """Return ‖left·right‖_F² of (m, k) and (k, n), by (k, k) Gram matrices only."""
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _stacked(factors: Sequence[np.ndarray], axis: int) -> np.ndarray:
    return np.concatenate([factor.astype(np.float64) for factor in factors], axis=axis)


def _layer(
    shares: np.ndarray, bs: Sequence[np.ndarray], as_: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Return ‖E‖_F² and ‖Σ p_k B_k A_k‖_F² of one layer."""
    b_mean = sum(p * b.astype(np.float64) for p, b in zip(shares, bs, strict=True))
    a_mean = sum(p * a.astype(np.float64) for p, a in zip(shares, as_, strict=True))
    apart = [p * (b - b_mean) for p, b in zip(shares, bs, strict=True)]
    error = _product_norm_squared(_stacked(apart, 1), _stacked([a - a_mean for a in as_], 0))
    weighted = [p * b for p, b in zip(shares, bs, strict=True)]
    return error, _product_norm_squared(_stacked(weighted, 1), _stacked(as_, 0))


def aggregation_error(weights: Sequence[float], uploads: Sequence[Adapter]) -> float | None:
    """Return ‖E‖_F / ‖Σ p_k B_k A_k‖_F over all layers, E = Σ p_k (B_k − B̄)(A_k − Ā).

    E is what averaging the factors apart from each other loses (methods.md, conventions); the
    scale s cancels.

    Args:
        weights: of the clients; p_k are these over their sum.
        uploads: adapters; where they lack one of the factors, nothing can be said of the products.

    Returns:
        0 for one client, or for clients that agree on a factor; None if a factor is missing.

    Privacy: a function of what was noised before it was sent.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    names = [name for name in uploads[0] if ".lora_B." in name]
    partners = {name: name.replace(".lora_B.", ".lora_A.") for name in names}
    if not names or any(partner not in uploads[0] for partner in partners.values()):
        return None
    layers = [
        _layer(shares, [upload[b] for upload in uploads], [upload[a] for upload in uploads])
        for b, a in partners.items()
    ]
    error, whole = (sum(layer[i] for layer in layers) for i in (0, 1))
    return float(np.sqrt(max(error, 0.0) / whole)) if whole > 0 else 0.0
