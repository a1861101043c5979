"""Rounds of the head alone before a method's first round: class means, then a linear probe."""

from collections.abc import Sequence
from dataclasses import replace

from lalora_app.adapter.factors import NONE, Adapter, Factors
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.class_means import class_means_head
from lalora_app.aggregation.rule import Aggregated, RoundInfo
from lalora_app.methods.method import Method
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import Limit, first_release
from lalora_app.settings.names import CLASS_MEANS
from lalora_app.settings.run_config import Config


def class_sum_releases(config: Config, past: Sequence[Release] = ()) -> list[Release]:
    """Return the release of class sums that a client plans before its steps; [] without one.

    Args:
        config: the run's config.
        past: the client's class sums of earlier attempts.

    Raises:
        BudgetError: if no noise is enough for ``privacy.head-share`` of ``privacy.epsilon``.
    """
    if config.model.head != CLASS_MEANS:
        return []
    privacy = config.privacy
    return [first_release(Limit(privacy.epsilon, privacy.delta), privacy.head_share, past)]


def after_head_rounds(method: Method, config: Config) -> Method:
    """Return the method behind the run's rounds of the head alone; its round 1 comes after them.

    In such a round no factor trains or travels, and the method's server rule does not run: factors,
    base and tasks wait as they are.

    Limit: without such rounds, the method itself.

    Privacy: rounds are counted by the ledger whatever they train; no extra cost.
    """
    first = config.head_rounds

    def trains(t: int, k: int) -> Factors:
        return method.trains(t - first, k) if t > first else NONE

    def syncs(t: int) -> Factors:
        return method.syncs(t - first) if t > first else NONE

    def aggregate(
        current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
    ) -> Aggregated:
        if config.sums_classes(info.t):
            return class_means_head(current, weights, uploads, info)
        if info.t <= first:
            return federated_averaging(current, weights, uploads, info)
        own = replace(info, t=info.t - first, rounds=info.rounds - first)
        return method.aggregate(current, weights, uploads, own)

    if first == 0:
        return method
    return replace(method, trains=trains, syncs=syncs, aggregate=aggregate)
