"""The learning rates of a run: one per kind of tensor, by round and step."""

import math

from lalora_app.adapter.factors import Kind
from lalora_app.settings.run_config import MethodNumbers, Train


def rate_factor(train: Train, before: int, steps: int) -> float:
    """Return the factor of all learning rates in one step of the run, in (0, 1].

    In the warm-up of w·n of n steps, the factor of step s, from 0, is (s + 1) / (w·n). After it,
    ``cosine`` gives (1 + cos(π·p)) / 2 at the share p of the other steps that are done. No step
    has the factor 0, which would be a release that trains nothing. Limit: 1 without a warm-up and
    a schedule, and in the first step of a warm-up of one step or less.

    Args:
        train: the run config's table ``train``.
        before: the steps before this one, in all successful rounds.
        steps: the steps of the run if all rounds succeed.
    """
    warm = train.warm_up * steps
    if before < warm:
        return min(1.0, (before + 1) / warm)
    if train.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (before - warm) / (steps - warm))) / 2


def learning_rates(train: Train, rule: MethodNumbers, t: int) -> dict[Kind, float]:
    """Return the learning rate of each kind of trained tensor in round ``t``, from 1.

    The rate of round t is the configured one times ``train.lr-decay`` to the power of t - 1.
    :func:`rate_factor` multiplies it in each step.
    """
    decay = train.lr_decay ** (t - 1)
    rates: dict[Kind, float] = {
        "A": train.lr_a,
        "B": train.lr_b,
        "W": train.lr_w,
        "head": train.lr_head,
        "gate": rule.lr_gate,
    }
    return {which: rate * decay for which, rate in rates.items()}
