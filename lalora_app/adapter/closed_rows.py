"""The rows of a head's output layer for classes of closed tasks, which keep their values."""

from collections.abc import Mapping, Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array, kind


def with_closed_rows(
    before: Mapping[str, Array], after: Mapping[str, Array], closed: Sequence[bool]
) -> Adapter:
    """Return ``after`` with the rows of closed classes as they were before.

    A closed class has a zero gradient. Without this its row would still move: by noise, by weight
    decay, and by the momentum of an optimiser.

    Args:
        before: an adapter with the same tensors.
        after: an adapter.
        closed: (classes,), whether the class is of a task that is not open; empty: heads are not
            divided.

    Limit: without closed classes the tensors are those of ``after``, not copied.

    Privacy: both adapters are noised already; no extra cost.
    """
    found = dict(after)
    if not any(closed):
        return found
    for name, array in after.items():
        if kind(name) == "head" and len(array) == len(closed):
            rows = np.array(closed).reshape(-1, *[1] * (array.ndim - 1))  # (classes, 1, …)
            found[name] = np.where(rows, before[name], array)
    return found
