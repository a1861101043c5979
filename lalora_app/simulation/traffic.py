"""The bytes of a run's messages, from the shapes of its adapter."""

from dataclasses import dataclass

import numpy as np

from lalora_app.adapter.factors import NONE, Adapter, num_bytes, select
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.methods.method import Method
from lalora_app.settings.run_config import Config
from lalora_app.wire.downlink import content_hash, parts

_PERIOD = 2  # of the factors that travel, in rounds


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors of one client's messages, without headers and the drift of the base.

    Attributes:
        up: of the replies of the method's rounds 1 and 2; later rounds repeat them in turn.
        last: of the last two possible replies: that of an odd and that of an even last round.
        down: of the requests after the method's rounds 1 and 2; later rounds repeat them in turn.
        whole: of the run's first request, which holds all tensors.
        head: of a reply of the head alone, and of the request after it.
        head_rounds: rounds of the head alone, before the method's round 1.
    """

    up: tuple[int, ...]
    last: tuple[int, ...]
    down: tuple[int, ...]
    whole: int
    head: int
    head_rounds: int

    def per_round(self, rounds: int) -> tuple[float, float]:
        """Return the means (up, down) of a run in which the client takes part in every round."""
        first = min(self.head_rounds, rounds)
        own = rounds - first  # rounds of the method
        ups = [self.head] * first + [self.up[t % _PERIOD] for t in range(own - 1)]
        if own:
            ups.append(self.last[(own - 1) % _PERIOD])
        later = [self.head] * first + [self.down[t % _PERIOD] for t in range(own)]
        downs = [self.whole, *later[: rounds - 1]]  # a request holds what the round before changed
        return sum(ups) / rounds, sum(downs) / rounds


def _download(method: Method, start: Adapter, config: Config, t: int) -> int:
    """Return the bytes of the tensors that the aggregation of round ``t`` changes.

    Two made-up uploads stand for those of clients.
    """
    rng = np.random.default_rng(0)
    uploads = [
        {n: x + rng.standard_normal(x.shape, np.float32) for n, x in sent.items()}
        for sent in [select(start, method.syncs(t))] * 2
    ]
    info = RoundInfo(t=t, rounds=config.num_server_rounds, seed=config.seed, numbers=config.rule)
    after = parts(method.aggregate(start, [1.0, 1.0], uploads, info).adapter, {})
    before = parts(start, {})
    return sum(
        num_bytes(part)
        for which, part in after.items()
        if content_hash(part) != content_hash(before[which])
    )


def traffic(method: Method, start: Adapter, config: Config) -> Traffic:
    """Return the bytes of a run's messages.

    Args:
        method: the run's method.
        start: its initial adapter.
        config: the run's config.
    """
    rounds = tuple(config.head_rounds + t for t in (1, 2))
    sent = {
        last: tuple(num_bytes(select(start, method.sent(t, last=last))) for t in rounds)
        for last in (False, True)
    }
    return Traffic(
        up=sent[False],
        last=sent[True],
        down=tuple(_download(method, start, config, t) for t in rounds),
        whole=num_bytes(start),
        head=num_bytes(select(start, NONE)),
        head_rounds=config.head_rounds,
    )
