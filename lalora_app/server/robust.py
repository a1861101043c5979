"""Robust means, which a few bad uploads change little, by Flower's implementations.

A robust mean replaces the uploads of a round by one upload, which the method's rule then averages.
It suits every method whose server rule is a mean.
"""

from collections.abc import Callable, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum

from lalora_app.adapter.factors import Adapter

Combine = Callable[[Sequence[Adapter], int], Adapter]


def _each(uploads: Sequence[Adapter], combine: Callable[[np.ndarray], np.ndarray]) -> Adapter:
    """Combine each tensor of all uploads, stacked to (clients, *shape), into one."""
    stacks = {name: np.stack([upload[name] for upload in uploads]) for name in uploads[0]}
    return {name: combine(stack).astype(np.float32) for name, stack in stacks.items()}


def median(uploads: Sequence[Adapter], suspects: int) -> Adapter:
    """Return the median of every entry (Yin et al., arXiv:1803.01498)."""
    return _each(uploads, lambda stack: np.asarray(np.median(stack, axis=0)))


def trimmed_mean(uploads: Sequence[Adapter], suspects: int) -> Adapter:
    """Return the mean of every entry without its ``suspects`` lowest and highest values."""
    # Flower cuts ⌊share · clients⌋ values per side and refuses a share of 1/2. With 0.25 added, it
    # cuts ``suspects`` values, and the share is below 1/2 for 2·suspects + 1 clients, the fewest.
    share = (suspects + 0.25) / len(uploads)
    return _each(uploads, lambda stack: np.asarray(trim_mean(stack, share)))


def krum(uploads: Sequence[Adapter], suspects: int) -> Adapter:
    """Return the upload with the smallest distances to its nearest others (arXiv:1703.02757)."""
    contents = [
        RecordDict({"arrays": ArrayRecord({n: Array(x.astype(np.float64)) for n, x in up.items()})})
        for up in uploads
    ]
    (chosen,) = select_multikrum(contents, suspects, 1)
    return uploads[next(i for i, content in enumerate(contents) if content is chosen)]


COMBINE: dict[str, Combine] = {"median": median, "trimmed-mean": trimmed_mean, "krum": krum}


def robust(
    kind: str, suspects: int, weights: Sequence[float], uploads: Sequence[Adapter]
) -> tuple[Sequence[float], Sequence[Adapter]]:
    """Return the weights and uploads that the method's rule averages.

    Args:
        kind: ``none`` for no change, or a key of :data:`COMBINE`, which ignores the weights.
        suspects: number of uploads that may be arbitrary.
        weights: weights of the clients.
        uploads: uploads with equal names and shapes.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    if kind == "none":
        return weights, uploads
    return [1.0], [COMBINE[kind](uploads, suspects)]
