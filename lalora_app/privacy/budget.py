"""Promises (ε, δ): what may still be released, and with how much noise."""

import math
from dataclasses import dataclass

from lalora_app.privacy.accounting import Release, calibrate, epsilon


class BudgetError(RuntimeError):
    """A limit would be exceeded; nothing was spent."""


@dataclass(frozen=True)
class Limit:
    """A promise (ε, δ) that no sequence of releases may break."""

    epsilon: float
    delta: float


def check_limit(past: list[Release], plan: Release, limit: Limit, whose: str) -> None:
    """Check that a plan keeps to a limit; ε = inf is none.

    Raises:
        BudgetError: if it does not.
    """
    if math.isinf(limit.epsilon):
        return
    spent = epsilon([*past, plan], limit.delta)
    if spent > limit.epsilon:
        raise BudgetError(
            f"the {whose}'s epsilon would be {spent:.3f}, and must be at most {limit.epsilon}"
        )


def noise_for(past: list[Release], limit: Limit, *, sampling_rate: float, steps: int) -> float:
    """Return the noise multiplier for the rest of a run: constant as long as all goes as planned.

    Args:
        past: the run's releases so far.
        limit: the run's promise; ε = inf gives 0.
        sampling_rate: q of the next releases.
        steps: planned releases from now to the end of the run, this round's included.

    If releases were lost on the way (a killed client, a repeated round), the rest gets more noise
    instead of more ε.

    Raises:
        BudgetError: if the past leaves nothing to spend.
    """
    if past and past[-1].sampling_rate == sampling_rate:
        last = past[-1].noise_multiplier
        planned = Release(sampling_rate, last, steps)
        if epsilon([*past, planned], limit.delta) <= limit.epsilon:
            return last
    try:
        return calibrate(
            limit.epsilon, limit.delta, sampling_rate=sampling_rate, steps=steps, past=past
        )
    except ValueError as error:
        raise BudgetError(str(error)) from error
