"""Measure the cost of padding a text independently of the other texts of its batch.

python benchmarks/padding.py                         # the default run's data and batch
python benchmarks/padding.py -c configs/mine.toml -c train.batch-size=32

It times sums of clipped gradients of the same batches (of Poisson sizes), in turn in one process,
with three kinds of padding: to 8, 16, 32 … tokens; to the longest text of the micro-batch, the
usual kind, with which one example can change another; and to model.max-length.
"""

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lalora_app.data.encoding import Batch, Encoded
from lalora_app.data.examples import split, with_classes
from lalora_app.models.backbone import Backbone, build
from lalora_app.private_step.step import _clipped_batch_sum
from lalora_app.settings.overrides import merged
from lalora_app.settings.run_config import Config, parse
from lalora_app.simulation.launch import app_defaults

APP = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sorted:
    """Examples sorted by length, in micro-batches, padded to at least ``width`` tokens."""

    inner: Encoded
    width: int

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[Batch]:
        """Yield the given examples."""
        order = sorted(indices, key=self.inner.length)
        for start in range(0, len(order), size):
            yield self.inner.batch(order[start : start + size], self.width)


def measure(model: Backbone, data: Encoded, config: Config, repeats: int) -> None:
    """Print tokens, micro-batches and seconds per batch, and the ratio to the usual padding."""
    kinds = {
        "to the longest": Sorted(data, 0),
        "8, 16, 32": data,
        "max-length": Sorted(data, config.model.max_length),
    }
    seconds = {kind: [] for kind in kinds}
    rng, train = np.random.default_rng(0), config.train
    for _ in range(repeats):
        indices = np.flatnonzero(rng.random(len(data)) < train.batch_size / len(data))
        for kind, examples in kinds.items():
            began = time.perf_counter()
            _clipped_batch_sum(
                model,
                examples,
                indices,
                config.privacy.clip_norm,
                train.micro_batch,
                config.privacy.clipping,
                dtype=None,
            )
            seconds[kind].append(time.perf_counter() - began)
    usual = seconds["to the longest"]
    for kind, examples in kinds.items():
        batches = list(examples.micro_batches(range(train.batch_size), train.micro_batch))
        ratio = statistics.median(a / b for a, b in zip(seconds[kind], usual, strict=True))
        tokens = sum(batch.inputs.numel() for batch in batches)
        print(
            f"{kind:16s} {tokens:6d} tokens in {len(batches)} micro-batches  "
            f"{statistics.median(seconds[kind]):.3f} s  ratio {ratio:.3f}",
            flush=True,
        )


def main() -> None:
    """Measure the default run, with the changes of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--run-config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    config = parse(app_defaults(APP) | merged(args.run_config))
    config = replace(config, data=with_classes(config.data))
    model, _ = build(config)
    model.engine.activate(frozenset(n for n in model.engine.parameters if ".lora_A." not in n))
    measure(model, model.encode(split(config.data)[0]), config, args.repeats)


if __name__ == "__main__":
    main()
