"""HetLoRA: average factors of different ranks, padded with zeros and weighted by their norm."""

import math
from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs
from lalora_app.adapter.low_rank import frobenius_norm, sum_of_products
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo


def _zero_padded(array: Array, shape: tuple[int, ...]) -> Array:
    """Return an array of the larger ``shape`` with ``array`` in its first rows and columns."""
    whole = np.zeros(shape, np.float32)
    whole[: array.shape[0], : array.shape[1]] = array
    return whole


def _product_norm(adapter: Adapter) -> float:
    """Return ‖B·A‖_F over all layers."""
    layers = [
        frobenius_norm(sum_of_products([(1.0, adapter[b], adapter[a])]))
        for b, a in factor_pairs(adapter)
    ]
    return math.hypot(*layers)


def padded_mean(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """HetLoRA: average zero-padded factors with p_k ∝ w_k·‖B_k A_k‖_F (arXiv:2401.06432, §3.2).

    The norm is taken over all layers of a client. The head is averaged with the weights w_k.
    Limit: if all products are zero, factors are averaged with w_k too.

    Privacy: norms of noised factors; no extra cost.
    """
    names = [name for pair in factor_pairs(current) for name in pair]
    padded = [{n: _zero_padded(up[n], current[n].shape) for n in names} for up in uploads]
    sizes = [w * _product_norm(up) for w, up in zip(weights, padded, strict=True)]
    merged = weighted_mean(current, sizes if sum(sizes) > 0 else weights, padded)
    heads = [{n: x for n, x in up.items() if n not in names} for up in uploads]
    return Aggregated(weighted_mean(merged, weights, heads))
