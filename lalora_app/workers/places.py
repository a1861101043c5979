"""Where the worker processes of a simulation compute."""

import os
from collections.abc import Sequence

import torch

from lalora_app.settings.errors import ConfigError
from lalora_app.workers.worker import Place


def all_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(device: str) -> list[str]:
    """Return the names of the GPUs of the workers, as ``CUDA_VISIBLE_DEVICES`` has them.

    Limit: for "cuda:N" the only name is "": every worker sees all GPUs and finds this one by its
    number.

    Args:
        device: ``model.device``; no GPU is taken for "cpu".
    """
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if count and device.startswith("cuda:"):
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (visible.split(",") if visible else [str(index) for index in range(count)])[:count]


def places(
    nodes: int, *, cores: int, gpus: Sequence[str], workers: int, clients_per_gpu: int
) -> list[Place]:
    """Return a place for each worker: a share of a GPU, or of the cores.

    Args:
        nodes: the number of simulated clients; more workers would be idle.
        cores: the number of cores.
        gpus: the names of the visible GPUs.
        workers: the number of workers; 0: ``clients_per_gpu`` per GPU, or one per core.
        clients_per_gpu: the number of clients that train on one GPU at the same time.

    Limit: one client gives one worker with all cores.

    Raises:
        ConfigError: for more workers than there are shares of GPUs, or cores.
    """
    most = len(gpus) * clients_per_gpu or cores
    if workers > most:
        share = f"--clients-per-gpu times the number of GPUs, {len(gpus)}"
        law = share if gpus else "the number of cores"
        raise ConfigError(f"--workers {workers} must be at most {most}, {law}")
    count = min(nodes, workers or most)
    threads = max(1, cores // count)
    return [Place(threads, gpus[i % len(gpus)] if gpus else "") for i in range(count)]
