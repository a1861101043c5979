"""Federated averaging (FedAvg) of the uploaded tensors (McMahan et al., arXiv:1602.05629)."""

from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.low_rank import Float64Array
from lalora_app.aggregation.rule import Aggregated, RoundInfo, normalised_weights


def mean_in_float64(shares: Float64Array, uploads: Sequence[Adapter], name: str) -> Float64Array:
    """Return ``Σ p_k X_k`` of one tensor; the shares p_k (clients,) add up to 1."""
    stack = np.stack([upload[name] for upload in uploads]).astype(np.float64)  # (clients, ...)
    return np.asarray(np.tensordot(shares, stack, axes=1))


def weighted_mean(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter]
) -> Adapter:
    """Replace every uploaded tensor by its weighted mean ``Σ p_k X_k`` over clients k.

    Tensors of ``current`` that no client uploads stay unchanged.

    Args:
        current: the global adapter.
        weights: positive numbers, one per client; normalised here to ``Σ p_k = 1``.
        uploads: one adapter per client, with equal names and shapes. Limit: for one client, the
            mean is its upload.

    Returns:
        A complete adapter in float32; sums are computed in float64.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    shares = normalised_weights(weights)
    merged = dict(current)
    for name in uploads[0]:
        merged[name] = mean_in_float64(shares, uploads, name).astype(np.float32)
    return merged


def federated_averaging(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """Average all uploaded tensors by :func:`weighted_mean`: the server rule of most methods."""
    return Aggregated(weighted_mean(current, weights, uploads))
