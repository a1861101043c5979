"""Measure the speed of a run on this machine, and the bytes of its messages, without running it.

It starts as many processes as the run would; they compute at the same time, each with its share of
the cores.
"""

import os
import time
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from lalora_app.privacy.planning import Speed
from lalora_app.settings.run_config import Config
from lalora_app.simulation.launch import Launch
from lalora_app.simulation.own_processes import call_in_own_processes
from lalora_app.simulation.traffic import Traffic

if TYPE_CHECKING:
    from lalora_app.workers.worker import Place

_EVAL_BATCH = 64  # as after a round


@dataclass(frozen=True)
class _Measured:
    """What one process found.

    Attributes:
        batch: expected number of examples of a step.
        step: seconds of a step, mean over the factors that take turns.
        evaluation: seconds of an evaluation of the whole test split.
        traffic: the bytes of the run's messages.
    """

    batch: int
    step: float
    evaluation: float
    traffic: Traffic


def _places(launch: Launch, sites: bool) -> "list[Place]":
    """Return where the run's clients would train; with ``sites``, one client with all cores."""
    from lalora_app.workers.places import all_cores, places, visible_gpus

    nodes, each = (1, 1) if sites else (launch.nodes, launch.clients_per_gpu)
    return places(
        nodes,
        cores=all_cores(),
        gpus=visible_gpus(launch.config.model.device),
        workers=0,
        clients_per_gpu=each,
    )


def _measure(launch: Launch, place: "Place") -> _Measured:
    """Time steps and an evaluation on the run's own data in this process."""
    if place.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # before CUDA is used for the first time
    from lalora_app.client.trial_step import limit_threads, measure_step
    from lalora_app.data.examples import split
    from lalora_app.data.task_division import with_names
    from lalora_app.methods.compatibility import method_of
    from lalora_app.models.backbone import build
    from lalora_app.simulation.traffic import traffic

    limit_threads(place.threads)
    config = replace(launch.config, data=with_names(launch.config.data))
    train, test = split(config.data)
    config = replace(config, train=replace(config.train, **_batch(config, len(train), launch)))
    model, start = build(config)
    cost = measure_step(config, model, start, model.encode(train))
    batches = model.encode(test).batches(_EVAL_BATCH)
    began = time.perf_counter()
    model.evaluate(batches)
    evaluation = time.perf_counter() - began
    moved = traffic(method_of(config), start, config)
    return _Measured(config.train.batch_size, mean(cost.seconds.values()), evaluation, moved)


def _batch(config: Config, examples: int, launch: Launch) -> dict[str, Any]:
    """Return the keys of a step as large as that of one client, on the examples of all."""
    if not config.train.sampling_rate:
        return {}
    mean_size = examples / (1 if config.central else launch.nodes)
    batch = max(round(config.train.sampling_rate * mean_size), 1)
    return {"batch_size": batch, "sampling_rate": 0.0}


def trial(launch: Launch, *, sites: bool = False) -> tuple[Speed, Traffic]:
    """Measure the run's speed, each process on its own share of the machine.

    Args:
        launch: the run; its batch size is that of the timed steps.
        sites: whether every client has a machine like this one for itself, and the server too.

    Raises:
        ConfigError: for data or a model that the run could not use.
        ProcessEndedError: if a process was ended from outside.

    Privacy: it reads the run's data and computes private steps whose results are thrown away. The
    durations depend on the data; show them only where the data may be seen.
    """
    (where,) = call_in_own_processes((_places, (launch, sites)))  # it imports torch
    found = call_in_own_processes(*((_measure, (launch, place)) for place in where))
    config, at_once = launch.config, launch.nodes if sites else len(where)
    evaluation = mean(each.evaluation for each in found) / len(found)
    step = mean(each.step for each in found)
    speed = Speed(found[0].batch / step, at_once, evaluation / config.evaluate_every)
    return speed, found[0].traffic
