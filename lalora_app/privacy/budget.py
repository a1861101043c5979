"""Limits (ε, δ): check planned releases, and choose the noise of the next ones.

`Ledger.reserve` calls `check_limit` before it writes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lalora_app.privacy.accounting import Release, calibrate, epsilon


class BudgetError(RuntimeError):
    """A limit would be exceeded; nothing was spent."""


@dataclass(frozen=True)
class Limit:
    """Upper limit of ε at δ for all releases together."""

    epsilon: float
    delta: float


def check_limit(
    past: list[Release], plan: Release, limit: Limit, owner: str, number: str = "epsilon"
) -> None:
    """Check that past and planned releases stay within a limit; ε = inf is no limit.

    Args:
        past: releases that are already on the ledger.
        plan: planned releases.
        limit: upper limit of ε for past and planned releases together.
        owner: name of the limit's owner in the error: run or node.
        number: name of the limited ε in the error.

    Raises:
        BudgetError: if the limit would be exceeded.
    """
    if math.isinf(limit.epsilon):
        return
    spent = epsilon([*past, plan], limit.delta)
    if spent > limit.epsilon:
        raise BudgetError(
            f"the {owner}'s {number} would be {spent:.3f}, and must be at most {limit.epsilon}"
        )


def first_release(limit: Limit, share: float, past: Sequence[Release] = ()) -> Release:
    """Return one release of all examples (q = 1) that costs a share of what a limit leaves.

    Of attempts 1, 2, … at one release, each costs the same share of the rest, so that the steps
    after them keep a part of the limit.

    Args:
        limit: ε and δ of all releases.
        share: the share of ε, or of what ``past`` leaves of it.
        past: the releases so far.

    Limit: ε = inf gives no noise.

    Raises:
        BudgetError: if no noise is enough for this share.
    """
    spent = epsilon(past, limit.delta) if past else 0.0
    target = limit.epsilon if math.isinf(limit.epsilon) else spent + share * (limit.epsilon - spent)
    try:
        noise = calibrate(target, limit.delta, sampling_rate=1.0, steps=1, past=past)
        return Release(1.0, noise, 1)
    except ValueError as error:
        raise BudgetError(str(error)) from error


def noise_for(
    past: Sequence[Release],
    limit: Limit,
    *,
    sampling_rate: float,
    steps: int,
    before: Sequence[Release] = (),
) -> float:
    """Return the noise multiplier for the rest of a run: constant if no release is repeated.

    Args:
        past: the run's releases so far.
        limit: the run's limit; ε = inf gives 0.
        sampling_rate: q of the next releases.
        steps: planned releases from this round to the end of the run.
        before: the run's releases of another kind, whose noise is not the one to keep.

    If a round is repeated (for example after a kill), its releases count twice; the remaining
    rounds then get more noise, and ε stays the same.

    Raises:
        BudgetError: if the past releases have used the whole limit.
    """
    if past and past[-1].sampling_rate == sampling_rate:
        last = past[-1].noise_multiplier
        planned = Release(sampling_rate, last, steps)
        if epsilon([*before, *past, planned], limit.delta) <= limit.epsilon:
            return last
    whole = [*before, *past]
    try:
        return calibrate(
            limit.epsilon, limit.delta, sampling_rate=sampling_rate, steps=steps, past=whole
        )
    except ValueError as error:
        raise BudgetError(str(error)) from error
