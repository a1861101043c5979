"""A study on real data: methods on SST-2 with MiniLM at one ε, by `lalora run`.

The recipe of "SST-2, large batches, on a GPU" in docs/results.md, with SGD and LoRA on query and
value.
"""

import functools
from collections.abc import Iterator, Mapping

from gpu_parts.app_runs import run
from gpu_parts.settings import Row, Settings, Unit
from lalora_app.settings.run_config import Scalar

METHODS = ("la-lora", "dp-lora", "rolora")
_CLIENTS, _EPSILON = 4, 1.0
_RECIPE: dict[str, Scalar] = {
    "num-server-rounds": 20,
    "evaluate-every": 4,
    "model.max-length": 64,
    "lora.targets": "query,value",
    "data.test-split": "validation",
    "data.input-column": "sentence",
    "data.partitioner": "iid",
    "privacy.epsilon": _EPSILON,
    "train.local-steps": 4,
    "train.batch-size": 256,
    "train.micro-batch": 256,
    "train.optimizer": "sgd",
    "train.lr-a": 4.0,
    "train.lr-b": 8.0,
    "train.lr-head": 32.0,
    "train.lr-decay": 0.97,
}
_QUICK: dict[str, Scalar] = {
    "num-server-rounds": 2,
    "evaluate-every": 1,
    "model.max-length": 16,
    "train.local-steps": 2,
    "train.batch-size": 8,
    "train.micro-batch": 8,
}


def measure(method: str, recipe: Mapping[str, Scalar], settings: Settings) -> Iterator[Row]:
    """Run one method and yield its result, in the form of benchmarks/results/gpu/study.jsonl."""
    assert settings.assets is not None
    own = {
        "method": method,
        "model.name": str(settings.assets / "models" / "minilm-l6-h384"),
        "model.device": settings.device,
        "data.name": str(settings.assets / "data" / "sst2"),
    }
    done = run(dict(recipe) | own, _CLIENTS)
    scored = [entry for entry in done.history if "accuracy" in entry]
    summary = done.summary
    yield {
        "method": method,
        "epsilon": str(_EPSILON),
        "targets": recipe["lora.targets"],
        "seed": 0,
        "deal": "iid",
        "rounds": summary["rounds"],
        "local_steps": recipe["train.local-steps"],
        "batch": recipe["train.batch-size"],
        "clients": _CLIENTS,
        "accuracy": summary["accuracy"],
        "balanced_accuracy": summary["balanced_accuracy"],
        "curve": [[entry["round"], entry["accuracy"]] for entry in scored],
        "epsilon_max": summary["epsilon_max"],
        "status": summary["status"],
        "bytes_up": summary["upload_bytes_per_round"],
        "bytes_down": summary["download_bytes_per_round"],
        "seconds": summary["seconds"],
    }


def units(settings: Settings) -> list[Unit]:
    """Return one unit per method."""
    recipe = _RECIPE | _QUICK if settings.quick else _RECIPE
    methods = METHODS[:1] if settings.quick else METHODS
    return [Unit(name, functools.partial(measure, name, recipe, settings)) for name in methods]
