"""HetLoRA: average padded factors of different ranks, and let the rank of a client shrink."""

import math
from collections.abc import Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, factor_pairs
from lalora_app.adapter.low_rank import frobenius_norm, sum_of_products
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo
from lalora_app.settings.run_config import MethodNumbers


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


def kept_directions(rank: int, numbers: MethodNumbers) -> int:
    """Return ⌊γ·r⌋, at least 1: the directions of a client of rank r outside of its tail.

    γ is ``rule.rank-decay``. Limits: γ = 1 keeps all; a rank of 1 never has a tail.
    """
    return max(1, math.floor(round(numbers.rank_decay * rank, 9)))  # 0.29·100 is 28.999…


def _tail_size(adapter: Adapter, numbers: MethodNumbers) -> float:
    """Return Σ ‖B[:, k:]‖_F·‖A[k:, :]‖_F over all layers, k = :func:`kept_directions`."""
    total = 0.0
    for b, a in factor_pairs(adapter):
        kept = kept_directions(len(adapter[a]), numbers)
        total += float(np.linalg.norm(adapter[b][:, kept:]) * np.linalg.norm(adapter[a][kept:]))
    return total


def pruned_rank(start: Adapter, upload: Adapter, numbers: MethodNumbers) -> int:
    """HetLoRA's self-pruning: r becomes ⌊γ·r⌋ if the tail has shrunk (arXiv:2401.06432, §3.2).

    The tail are the last r − ⌊γ·r⌋ directions, its size is Σ ‖B[:, k:]‖·‖A[k:]‖ over the layers.
    The paper's clients decide; here the server does, which has both adapters, so that a client
    keeps no state. Limits: γ = 1 and a zero start keep the rank.

    Args:
        start: the adapter that the client has received, at its rank.
        upload: both factors of the client's reply, of the same shapes.
        numbers: the table ``rule`` of the run config; read is ``rank_decay``, γ.

    Privacy: a decision on noised factors; no extra cost.
    """
    rank = len(upload[next(a for _, a in factor_pairs(upload))])
    before = {name: start[name] for name in upload}
    shrunk = _tail_size(upload, numbers) < _tail_size(before, numbers)
    return kept_directions(rank, numbers) if shrunk else rank
