"""Measure what LoSA's pruned input features save in a Linear layer, in turn in one process.

python benchmarks/pruned_features.py --threads 1

LoSA prunes whole input features, so a pruned layer is a smaller dense layer behind a choice of
features: no sparse kernel is needed. Each row has the least, median and largest ratio of its time
to that of the whole layer. ``W * M`` in the whole layer, as a run computes it, saves nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (3072, 768))  # inputs, outputs
SPARSITIES = (0.1, 0.3, 0.5)  # LoSA's rule.sparsity; 0.1 is the default


def seconds(step: Callable[[], Tensor]) -> float:
    """Return the time of one call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def ratios(inputs: int, outputs: int, sparsity: float, rows: int, repeats: int) -> list[float]:
    """Return the sorted ratios of pruned to whole layer over interleaved repeats."""
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    kept = torch.randperm(inputs)[: round(inputs * (1 - sparsity))].sort().values
    small = weight[:, kept].contiguous()

    def pruned() -> Tensor:
        return linear(x.index_select(1, kept), small, bias)

    def whole() -> Tensor:
        return linear(x, weight, bias)

    pairs = [(seconds(pruned), seconds(whole)) for _ in range(repeats + 3)][3:]
    return sorted(a / b for a, b in pairs)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="tokens of all examples")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print("| inputs × outputs | pruned | ratio of time [least-largest] |\n|---|---|---|")
    for inputs, outputs in SHAPES:
        for sparsity in SPARSITIES:
            found = ratios(inputs, outputs, sparsity, args.rows, args.repeats)
            shown = f"{statistics.median(found):.2f} [{found[0]:.2f}-{found[-1]:.2f}]"
            print(f"| {inputs} × {outputs} | {sparsity:.0%} | {shown} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
