"""Measure a private step with and without ``model.prefix-cache``, in turn in one process.

python benchmarks/prefix_cache.py                    # MiniLM-L6, its last two of six blocks, SST-2
python benchmarks/prefix_cache.py -c train.batch-size=64 --repeats 40 --output mine.json
python benchmarks/prefix_cache.py --threads 1        # on a shared machine
python benchmarks/prefix_cache.py -c 'method="head-only"'  # the head's input is kept

Both steps have the same Poisson batches and the same adapters in the last blocks. The time is that
of ``private_gradient``: batches, forward, backward, clip and noise. The states of all examples are
kept before the clock starts; the time of computing them is told apart. ``flops`` and ``peak_bytes``
are exact counts of the clipped sum of one batch. The error is that of this sum, relative to the sum
without the cache; with states kept in float32 it is 0 or rounding.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import flops, peak_bytes
from torch import Tensor

from lalora_app.adapter.factors import Adapter, active_names
from lalora_app.blocks.kept_states import StatesInFile, StatesInMemory
from lalora_app.blocks.with_states import STATES_DTYPE, WithStates, size_of
from lalora_app.data.encoding import Encoded
from lalora_app.data.examples import Examples, split, with_classes
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy import randomness
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step.step import RandomStreams, _clipped_batch_sum, private_gradient
from lalora_app.settings.overrides import merged
from lalora_app.settings.run_config import Config, parse
from lalora_app.simulation.launch import app_defaults

APP = Path(__file__).resolve().parents[1]
RESULTS = APP / "benchmarks" / "results" / "prefix_cache.json"
# lora.targets, the place of the states and the trained factors of each row
ROWS = (
    ("auto", "memory", "B"),
    ("auto", "memory", "A"),
    ("auto", "memory", "AB"),
    ("auto", "file", "B"),
    ("auto", "file", "A"),
    ("intermediate.dense", "memory", "B"),
    ("intermediate.dense", "memory", "A"),
)
HEAD_ROWS = (("auto", "memory", ""), ("auto", "file", ""))  # of method="head-only"
KEYS = {
    "model.name": str(APP.parent / "shared" / "models" / "minilm-l6-h384"),
    "model.max-length": 64,
    "data.name": str(APP.parent / "shared" / "data" / "sst2"),
    "data.test-split": "validation",
    "data.input-column": "sentence",
    "lora.layers": "last:2",
    "model.prefix-cache": True,
    "train.batch-size": 256,
    "train.micro-batch": 64,
}


def seconds(model: Backbone, data: Encoded, config: Config, repeat: int) -> tuple[float, float]:
    """Return the elapsed and the CPU time of one private step; equal repeats draw equal batches."""
    q = config.train.batch_size / len(data)
    streams = (randomness.seeded(0, name, "client", repeat) for name in ("sampling", "noise"))
    began, cpu = time.perf_counter(), time.process_time()
    private_gradient(
        model,
        data,
        reservation=Reservation(Release(q, 1.0, 1)),
        clip_norm=config.privacy.clip_norm,
        micro_batch=config.train.micro_batch,
        streams=RandomStreams(*streams),
    )
    return time.perf_counter() - began, time.process_time() - cpu


def batch_sum(model: Backbone, data: Encoded, config: Config) -> dict[str, Tensor]:
    """Return the clipped sum of the first examples."""
    indices, privacy = np.arange(config.train.batch_size), config.privacy
    micro = config.train.micro_batch
    return _clipped_batch_sum(
        model, data, indices, privacy.clip_norm, micro, privacy.clipping, dtype=None
    )


def sum_error(model: Backbone, plain: Encoded, cached: Encoded, config: Config) -> float:
    """Return the relative error of the clipped sum of one batch."""
    found, wanted = (batch_sum(model, data, config) for data in (cached, plain))

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([t.double().norm() for t in tensors]).norm())

    return norm([found[n] - wanted[n] for n in wanted]) / norm(list(wanted.values()))


def ratios(without: list[float], cached: list[float], name: str) -> dict[str, float]:
    """Return the medians of two interleaved series, and least, median and largest ratio."""
    found = sorted(b / a for a, b in zip(without, cached, strict=True))
    return {
        f"without_{name}": statistics.median(without),
        f"with_{name}": statistics.median(cached),
        f"ratio_{name}": statistics.median(found),
        f"ratio_{name}_least": found[0],
        f"ratio_{name}_largest": found[-1],
    }


def row(
    model: Backbone, plain: Encoded, cached: WithStates, config: Config, repeats: int
) -> dict[str, float]:
    """Return the times of one phase and the errors of its sum."""
    steps = [
        [seconds(model, data, config, repeat) for data in (plain, cached)]
        for repeat in range(repeats + 2)
    ][2:]  # the first steps allocate memory
    found = {}
    for kind, name in enumerate(("elapsed_s", "cpu_s")):
        without, with_cache = ([step[which][kind] for step in steps] for which in (0, 1))
        found |= ratios(without, with_cache, name)
    wide = replace(cached, kept=StatesInMemory(), dtype=torch.float32)
    sums = [partial(batch_sum, model, data, config) for data in (plain, cached)]
    for count in (flops, peak_bytes):
        without, with_cache = map(count, sums)
        found[f"{count.__name__}_without"], found[f"{count.__name__}_with"] = without, with_cache
    found["sum_error"] = sum_error(model, plain, cached, config)
    return found | {"sum_error_float32": sum_error(model, plain, wide, config)}


def filled(cached: WithStates) -> float:
    """Keep the states of all examples, and return the seconds."""
    began = time.perf_counter()
    for _ in cached.batches(64):
        pass
    return time.perf_counter() - began


@dataclass(frozen=True)
class Case:
    """A model with its examples, and the same examples with states in memory and in a file."""

    model: Backbone
    start: Adapter
    plain: Encoded
    cached: Mapping[str, WithStates]
    seconds_to_keep: Mapping[str, float]
    bytes_kept: Mapping[str, int]


def prepared(config: Config, examples: int, folder: Path) -> Case:
    """Build the model, and keep the states of all examples in both places."""
    model, start = build(config)
    torch.manual_seed(0)
    for name, parameter in model.engine.parameters.items():
        if (
            name in start and ".lora_B." in name
        ):  # it begins at zero, so the gradient of A would be zero
            torch.nn.init.normal_(parameter, std=0.02)
    train = split(config.data)[0]
    plain = model.encode(Examples(train.contents[:examples], train.labels[:examples]))
    sizes = [size_of(plain, model.prefix, index) for index in range(len(plain))]
    memory, path = StatesInMemory(), folder / "x.states"
    places = {"memory": memory, "file": StatesInFile(path, bytes(32), sizes)}
    cached = {n: WithStates(plain, model.prefix, model.states, k) for n, k in places.items()}
    spent = {name: filled(data) for name, data in cached.items()}
    kept = {"memory": memory.size_in_bytes(), "file": path.stat().st_size}
    return Case(model, start, plain, cached, spent, kept)


def measure(config: Config, examples: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Return all rows, and the bytes of the kept states."""
    rows, cases = [], {}
    for targets, place, phase in HEAD_ROWS if config.method == "head-only" else ROWS:
        own = replace(config, lora=replace(config.lora, targets=targets))
        if targets not in cases:
            cases[targets] = prepared(own, examples, folder / f"{len(cases)}")
        case = cases[targets]
        case.model.engine.activate(active_names(case.start, frozenset(phase)))
        about = {"targets": targets, "kept_in": place, "factors": phase}
        rows.append(about | row(case.model, case.plain, case.cached[place], own, repeats))
        print(json.dumps(rows[-1]), flush=True)
    case = cases["auto"]
    return {
        "rows": rows,
        "examples": len(case.plain),
        "tokens": sum(map(case.plain.length, range(len(case.plain)))),
        "states_dtype": str(STATES_DTYPE),
        "bytes_kept": case.bytes_kept,
        "seconds_to_keep": case.seconds_to_keep,
    }


def main() -> None:
    """Measure, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--run-config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = parse(app_defaults(APP) | KEYS | merged(args.run_config))
    config = replace(config, data=with_classes(config.data))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, args.examples, args.repeats, Path(folder))
    about = {
        "model": Path(config.model.name).name,
        "layers": config.lora.layers,
        "batch_size": config.train.batch_size,
        "micro_batch": config.train.micro_batch,
        "max_length": config.model.max_length,
        "repeats": args.repeats,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    args.output.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
