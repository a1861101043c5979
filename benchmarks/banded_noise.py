"""Calculate what banded correlated noise would gain over independent noise at a client.

python benchmarks/banded_noise.py --output benchmarks/results/banded_noise.json

Banded matrix factorisation (Choquette-Choo et al., arXiv:2306.08153): the noise of T steps is
C⁻¹·Z, with C lower triangular, b bands and columns of length 1. With b-cyclic Poisson sampling the
examples are dealt to b groups, and step t draws from group t mod b with probability b·q. Its
privacy is that of T/b releases with sampling rate b·q and noise multiplier z (their Theorem 4), so
this project's accountant calibrates z. The error is the standard deviation of the noise in the sum
of all steps so far, which is what SGD adds to the weights: root mean square over the T sums, and of
the last one. C is the square root of the matrix of sums, cut at b bands (their section 5 finds a
slightly better one numerically). b = 1 is DP-SGD. No data is read.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy.linalg import solve_triangular, toeplitz

from lalora_app.privacy.accounting import calibrate

DELTA = 1e-5
# name -> sampling rate of a client
CASES = {
    "SST-2, 4 clients, batch 256": 256 / 16837,
    "Tiny-ImageNet, 4 clients, batch 64": 64 / 2000,
}


def banded_root(steps: int, bands: int) -> np.ndarray:
    """Return (steps, steps): the root of the matrix of sums, b bands, columns of length 1."""
    first = np.zeros(steps)
    first[0] = 1.0
    for k in range(1, min(bands, steps)):
        first[k] = first[k - 1] * (2 * k - 1) / (2 * k)
    root = np.tril(toeplitz(first))
    return root / np.linalg.norm(root, axis=0)


def errors(steps: int, bands: int) -> tuple[float, float]:
    """Return the noise in the sums for z = 1: root mean square over all sums, and of the last."""
    sums = np.tril(np.ones((steps, steps)))
    rows = solve_triangular(banded_root(steps, bands), sums.T, lower=True, trans="T").T
    each = np.linalg.norm(rows, axis=1)
    return math.sqrt(np.mean(each**2)), float(each[-1])


def row(name: str, epsilon: float, steps: int, bands: int) -> dict[str, float | str]:
    """Return the noise multiplier and the errors of one setting."""
    rate = min(1.0, CASES[name] * bands)
    z = calibrate(epsilon, DELTA, sampling_rate=rate, steps=math.ceil(steps / bands))
    every, last = errors(steps, bands)
    sizes = {"epsilon": epsilon, "steps": steps, "bands": bands}
    return {"case": name, **sizes, "z": z, "rms": z * every, "last": z * last}


def main() -> None:
    """Calculate all rows, print each with its ratio to independent noise, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    settings = [(c, e, s) for c in CASES for e in (1.0, 3.0, 8.0) for s in (40, 80, 200)]
    for name, epsilon, steps in settings:
        group = [row(name, epsilon, steps, bands) for bands in (1, 2, 4, 8, 16)]
        base = group[0]
        for one in group:
            one["rms_ratio"] = one["rms"] / base["rms"]
            one["last_ratio"] = one["last"] / base["last"]
        rows += group
        texts = [f"b={r['bands']}: {r['rms_ratio']:.2f} {r['last_ratio']:.2f}" for r in group]
        print(f"{name}, ε = {epsilon:g}, {steps} steps:", ", ".join(texts), flush=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
