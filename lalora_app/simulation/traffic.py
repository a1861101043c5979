"""The bytes of a run's messages, from the shapes of its adapter."""

from dataclasses import dataclass

import numpy as np

from lalora_app.adapter.factors import Adapter, num_bytes, select
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.methods.method import Method
from lalora_app.settings.run_config import Config
from lalora_app.wire.downlink import content_hash, parts

_PERIOD = 2  # of the factors that travel, in rounds


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors of one client's messages, without headers and the drift of the base.

    Attributes:
        up: of the replies of rounds 1 and 2; later rounds repeat them in turn.
        last: of the last two possible replies: that of an odd and that of an even last round.
        down: of the requests of rounds 1, 2 and 3; later rounds repeat the last two in turn.
    """

    up: tuple[int, ...]
    last: tuple[int, ...]
    down: tuple[int, ...]

    def per_round(self, rounds: int) -> tuple[float, float]:
        """Return the means (up, down) of a run in which the client takes part in every round."""
        ups = [self.up[t % _PERIOD] for t in range(rounds - 1)]
        ups.append(self.last[(rounds - 1) % _PERIOD])
        downs = [self.down[0 if t == 0 else 1 + (t - 1) % _PERIOD] for t in range(rounds)]
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
    sent = {
        last: tuple(num_bytes(select(start, method.sent(t, last=last))) for t in (1, 2))
        for last in (False, True)
    }
    later = (_download(method, start, config, t) for t in (1, 2))
    return Traffic(sent[False], sent[True], (num_bytes(start), *later))
