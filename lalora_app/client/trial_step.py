"""Measure one private step on a client's own data: seconds and memory, for this client only."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from lalora_app.adapter.factors import Adapter, Factors, active_names, factors_text
from lalora_app.data.encoding import Encoded
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import Backbone
from lalora_app.privacy import randomness
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step.step import RandomStreams, private_gradient
from lalora_app.private_step.views import private_views
from lalora_app.settings.run_config import Config

_REPEATS = 3  # counted steps; one step before them allocates memory
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in one unit of ru_maxrss


@dataclass(frozen=True)
class StepCost:
    """The cost of one private step.

    Attributes:
        seconds: trained factors, such as "A" or "A+B", or "head" -> median seconds of a step.
        peak_bytes: largest memory: of the GPU, or of this whole process on a CPU.
    """

    seconds: dict[str, float]
    peak_bytes: int


def _steps(config: Config) -> Iterator[Factors]:
    """Yield each set of factors that a step of the method trains."""
    method = method_of(config)
    first = 1 + config.sums_classes(1)  # a round of class sums has no step
    rounds = range(first, config.head_rounds + 3)
    pairs = ((t, k) for t in rounds for k in range(min(2, config.train.local_steps)))
    yield from dict.fromkeys(method.trains(t, k) for t, k in pairs)


def _seconds(config: Config, model: Backbone, data: Encoded) -> float:
    """Return the duration of one step with its Poisson batch, clip and noise."""
    q = config.train.rate(len(data))
    streams = RandomStreams(randomness.secure(), randomness.secure())
    began = time.perf_counter()
    private_gradient(
        model,
        private_views(data, config.train.views, streams.sampling),
        reservation=Reservation(Release(q, 1.0, 1)),
        clip_norm=config.privacy.clip_norm,
        micro_batch=config.train.micro_batch,
        streams=streams,
        clipping=config.privacy.clipping,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began


def limit_threads(threads: int) -> None:
    """Let torch use at most this number of threads in this process."""
    torch.set_num_threads(min(torch.get_num_threads(), threads))


def _peak(model: Backbone) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def measure_step(config: Config, model: Backbone, start: Adapter, data: Encoded) -> StepCost:
    """Run a few private steps and return their cost; the model then holds ``start``.

    Args:
        config: the run's config; its expected batch is at most the number of examples.
        model: the backbone.
        start: the initial adapter.
        data: the client's encoded examples.

    Privacy: the gradients are thrown away, so no release is counted. The durations depend on the
    private batches; show them at the site only.
    """
    model.load(start)
    seconds = {}
    for factors in _steps(config):
        model.engine.activate(active_names(start, factors))
        seconds[factors_text(factors)] = median(
            [_seconds(config, model, data) for _ in range(_REPEATS + 1)][1:]
        )
    return StepCost(seconds, _peak(model))
