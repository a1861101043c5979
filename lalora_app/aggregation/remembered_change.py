"""DP-FedAdamW's server rule: the mean, and the change that it makes, for the next local steps."""

from collections.abc import Sequence

from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.parametrisations import change_name
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo


def average_and_remember(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """DP-FedAdamW: average all that travels, and keep Δ_G, the change of each tensor.

    The mean second moments are averaged like the factors; clients start from them, and their steps
    follow Δ_G (arXiv:2602.19945, Alg. 2). Both are tensors of the adapter, so that checkpoints and
    requests hold them. Limit: clients that change nothing leave Δ_G zero.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    changes = {
        change_name(name): merged[name] - current[name]
        for name in current
        if change_name(name) in current
    }
    return Aggregated(merged | changes)
