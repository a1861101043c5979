"""METHODS: every federated-LoRA method as one value. Clip and noise belong to the run, not here."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lalora_app import schedule
from lalora_app.adapter import Adapter
from lalora_app.aggregate import mean
from lalora_app.config import ConfigError
from lalora_app.filters import binomial, identity, permuted, scaled
from lalora_app.privacy.types import NoisedGrads
from lalora_app.schedule import Factor, Syncs, Trains


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated-LoRA method: plain functions, looked up by name on both sides of the wire.

    Attributes:
        paper: where it comes from.
        trains: (round t, step k) -> the factors that take this local step; never empty.
        syncs: round t -> the factors that travel up and are aggregated.
        postprocess: noised gradients -> gradients for the optimiser.
        aggregate: (global adapter, weights, uploads) -> global adapter.
        exact: the aggregate's product equals the mean of the clients' products.
    """

    paper: str
    trains: Trains
    syncs: Syncs
    postprocess: Callable[[NoisedGrads], NoisedGrads] = identity
    aggregate: Callable[[Adapter, Sequence[float], Sequence[Adapter]], Adapter] = mean
    exact: bool = False

    def resident(self, t: int, local_steps: int) -> frozenset[Factor]:
        """Return the factors that round ``t`` trains without sending them."""
        return schedule.trained(self.trains, t, local_steps) - self.syncs(t)


_LA_LORA = Method(
    paper="arXiv:2602.19926, only the active factor travels",
    trains=schedule.alternate_steps,
    syncs=schedule.alternate_rounds,
    postprocess=binomial,
)
_LA_LORA_FULL = replace(_LA_LORA, paper="arXiv:2602.19926, Alg. 1", syncs=schedule.both)

METHODS: dict[str, Method] = {
    "dp-lora": Method(paper="arXiv:2312.17493", trains=schedule.both, syncs=schedule.both),
    "ffa-lora": Method(
        paper="arXiv:2403.12313", trains=schedule.only_b, syncs=schedule.only_b, exact=True
    ),
    "rolora": Method(
        paper="arXiv:2502.01755",
        trains=schedule.alternate_rounds,
        syncs=schedule.alternate_rounds,
        exact=True,
    ),
    "la-lora": _LA_LORA,
    "la-lora-no-filter": replace(_LA_LORA, postprocess=identity),
    "la-lora-scaled": replace(_LA_LORA, postprocess=scaled),
    "la-lora-permuted": replace(_LA_LORA, postprocess=permuted),
    "la-lora-full": _LA_LORA_FULL,
    "la-lora-full-no-filter": replace(_LA_LORA_FULL, postprocess=identity),
    "la-lora-full-scaled": replace(_LA_LORA_FULL, postprocess=scaled),
    "la-lora-full-permuted": replace(_LA_LORA_FULL, postprocess=permuted),
}


def lookup(name: str, local_steps: int) -> Method:
    """Return the method called ``name``, after checking that its rounds train what they send.

    Raises:
        ConfigError: if there is no such method, or ``local_steps`` is too few for its schedule.
    """
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        known = ", ".join(METHODS)
        raise ConfigError(
            f'method={json.dumps(name)} must be one of {known}; did you mean "{nearest}"?'
        )
    method = METHODS[name]
    for t in (1, 2):  # the longest period of any schedule
        if not method.syncs(t) <= schedule.trained(method.trains, t, local_steps):
            raise ConfigError(
                f"train.local-steps={local_steps} must be at least 2 for method {name}: "
                "a round must train every factor that it sends"
            )
    return method
