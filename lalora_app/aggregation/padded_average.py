"""HetLoRA: factors of different ranks, padded with zeros and weighted by their size."""

import math
from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, pairs
from lalora_app.adapter.low_rank import norm, stacked
from lalora_app.aggregation.average import mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo


def _padded(array: Array, shape: tuple[int, ...]) -> Array:
    whole = np.zeros(shape, np.float32)
    whole[: array.shape[0], : array.shape[1]] = array
    return whole


def _size(adapter: Adapter) -> float:
    """Return ‖B·A‖_F over all layers."""
    layers = [norm(stacked([(1.0, adapter[b], adapter[a])])) for b, a in pairs(adapter)]
    return math.hypot(*layers)


def padded_mean(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """Average zero-padded factors with p_k ∝ w_k·‖B_k A_k‖_F (arXiv:2401.06432, §3.2).

    The norm is over all layers of a client. The head is averaged by the plain weights. Limit: all
    products zero gives the plain mean.

    Privacy: the norms are those of noised factors; no extra cost.
    """
    names = [name for pair in pairs(current) for name in pair]
    padded = [{n: _padded(up[n], current[n].shape) for n in names} for up in uploads]
    sizes = [w * _size(up) for w, up in zip(weights, padded, strict=True)]
    merged = mean(current, sizes if sum(sizes) > 0 else weights, padded)
    heads = [{n: x for n, x in up.items() if n not in names} for up in uploads]
    return Aggregated(mean(merged, weights, heads))
