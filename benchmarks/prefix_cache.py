"""Measure a private step with and without ``model.prefix-cache``, in turn in one process.

python benchmarks/prefix_cache.py                    # MiniLM-L6, its last two of six blocks, SST-2
python benchmarks/prefix_cache.py -c train.batch-size=32 --repeats 40 --output mine.json

Both steps have the same Poisson batches and the same adapters in the last blocks. The time is that
of ``private_gradient``: batches, forward, backward, clip and noise. The states of all examples are
kept before the clock starts; the time of computing them is told apart. The error is that of the
clipped sum, relative to the sum without the cache; in float32 it is the rounding of another order.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter.factors import active_names
from lalora_app.blocks.kept_states import KeptStates, StatesInFile, StatesInMemory
from lalora_app.blocks.with_states import STATES_DTYPE, WithStates, size_of
from lalora_app.cli.simulation import app_defaults
from lalora_app.data.encoding import Encoded
from lalora_app.data.examples import Examples, split, with_classes
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy import randomness
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step.step import RandomStreams, _clipped_batch_sum, private_gradient
from lalora_app.settings.overrides import merged
from lalora_app.settings.run_config import Config, parse

APP = Path(__file__).resolve().parents[1]
RESULTS = APP / "benchmarks" / "results" / "prefix_cache.json"
PHASES = ("B", "A", "AB")
KEYS = {
    "model.name": str(APP.parent / "shared" / "models" / "minilm-l6-h384"),
    "model.max-length": 64,
    "data.name": str(APP.parent / "shared" / "data" / "sst2"),
    "data.test-split": "validation",
    "data.input-column": "sentence",
    "lora.layers": "last:2",
    "model.prefix-cache": True,
}


def seconds(model: Backbone, data: Encoded, config: Config, repeat: int) -> float:
    """Return the duration of one private step; equal repeats draw equal batches."""
    q = config.train.batch_size / len(data)
    streams = (randomness.seeded(0, name, "client", repeat) for name in ("sampling", "noise"))
    began = time.perf_counter()
    private_gradient(
        model,
        data,
        reservation=Reservation(Release(q, 1.0, 1)),
        clip_norm=config.privacy.clip_norm,
        micro_batch=config.train.micro_batch,
        streams=RandomStreams(*streams),
    )
    return time.perf_counter() - began


def sum_error(model: Backbone, plain: Encoded, cached: Encoded, config: Config) -> float:
    """Return the relative error of the clipped sum of one batch."""
    indices = np.arange(config.train.batch_size)
    found, wanted = (
        _clipped_batch_sum(model, d, indices, config.privacy.clip_norm, config.train.micro_batch)
        for d in (cached, plain)
    )

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([t.double().norm() for t in tensors]).norm())

    return norm([found[n] - wanted[n] for n in wanted]) / norm(list(wanted.values()))


def row(
    model: Backbone, plain: Encoded, cached: WithStates, config: Config, repeats: int
) -> dict[str, float]:
    """Return the times of one phase and the errors of its sum."""
    pairs = [
        tuple(seconds(model, data, config, repeat) for data in (plain, cached))
        for repeat in range(repeats + 2)
    ][2:]  # the first steps allocate memory
    ratios = sorted(with_cache / without for without, with_cache in pairs)
    wide = replace(cached, kept=StatesInMemory(), dtype=torch.float32)
    return {
        "without_s": statistics.median(pair[0] for pair in pairs),
        "with_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_largest": ratios[-1],
        "sum_error": sum_error(model, plain, cached, config),
        "sum_error_float32": sum_error(model, plain, wide, config),
    }


def filled(cached: WithStates) -> float:
    """Keep the states of all examples, and return the seconds."""
    began = time.perf_counter()
    for _ in cached.batches(64):
        pass
    return time.perf_counter() - began


def measure(config: Config, examples: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Return the rows of all phases, with states in memory and in a file."""
    model, start = build(config)
    torch.manual_seed(0)
    for name, parameter in model.engine.parameters.items():
        if ".lora_B." in name:  # it begins at zero, so the gradient of A would be zero
            torch.nn.init.normal_(parameter, std=0.02)
    train = split(config.data)[0]
    plain = model.encode(Examples(train.contents[:examples], train.labels[:examples]))
    sizes = [size_of(plain, model.prefix, index) for index in range(len(plain))]
    memory, path = StatesInMemory(), folder / "x.states"
    places: dict[str, KeptStates] = {
        "memory": memory,
        "file": StatesInFile(path, bytes(32), sizes),
    }
    rows, fill = [], {}
    for place, kept in places.items():
        cached = WithStates(plain, model.prefix, model.states, kept)
        fill[place] = filled(cached)
        for phase in PHASES:
            model.engine.activate(active_names(start, frozenset(phase)))
            rows.append(
                {"kept_in": place, "factors": phase} | row(model, plain, cached, config, repeats)
            )
            print(json.dumps(rows[-1]), flush=True)
    return {
        "rows": rows,
        "examples": len(plain),
        "tokens": sum(map(plain.length, range(len(plain)))),
        "states_dtype": str(STATES_DTYPE),
        "memory_bytes": memory.size_in_bytes(),
        "file_bytes": path.stat().st_size,
        "seconds_to_keep_all": fill,
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
