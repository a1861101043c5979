"""Check the private step on a device: clipped sums, noise, resting factors, waiting for the GPU.

python benchmarks/gpu_checks.py --device cuda --output gpu_checks.json
python benchmarks/gpu_checks.py --device cpu --model swin --kernels fused --types float32

Clipped sums are compared with float64 gradients of single examples (`gpu_reference.py`).
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_reference import (
    EXAMPLES,
    MAKERS,
    Grads,
    KernelOnDevice,
    exact_gradients,
    joint_norm,
    local_settings,
    make_backbone,
    make_data,
    relative_error,
    rows,
    stock_gradients,
    sum_of_clipped,
    take_steps,
)
from models import Row
from torch import Tensor
from variants import PHASES

from lalora_app.adapter.factors import active_names
from lalora_app.client.local_round import make_optimizer
from lalora_app.models.backbone import Backbone
from lalora_app.models.device import pick_device
from lalora_app.privacy.randomness import secure, seeded
from lalora_app.private_step.mechanism import add_noise

KERNELS = ("fused", "merged", "plain", "compiled")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STANDARD_ERRORS = 5  # a fair draw is further from its mean with probability 6e-7
Subject = dict[str, str]  # model, number type and kernel of a check


class Report:
    """The findings; the file is written after each of them.

    Args:
        path: the JSON file; None: no file.
    """

    def __init__(self, path: Path | None = None):
        self.rows: list[dict[str, Any]] = []
        self._path = path

    def add(self, check: str, ok: bool | None, **values: Any) -> None:
        """Print and keep a finding.

        Args:
            check: the name of the check.
            ok: whether the check passed; None for a value without a limit.
            **values: the measured values.
        """
        self.rows.append({"check": check, "ok": ok, **values})
        verdict = {True: "ok", False: "WRONG", None: "--"}[ok]
        shown = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(f"{verdict:6}{check:20}", *shown, flush=True)
        if self._path:
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            self._path.write_text(f"[\n{lines}\n]\n", "utf-8")

    @contextlib.contextmanager
    def failing(self, check: str, subject: Subject) -> Iterator[None]:
        """Report an exception in the block as a failed check, and continue."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(check, False, **subject, error=f"{type(error).__name__}: {error}"[:300])


def _subject(model: str, dtype: str, kernel: str) -> Subject:
    return {"model": model, "dtype": dtype, "kernel": kernel}


def check_sums(
    report: Report, device: torch.device, name: str, row: Row, kernels: list[str], types: list[str]
) -> None:
    """Compare the clipped sums of one model with those of single examples in float64."""
    on_cpu = row.make_batch(EXAMPLES, torch.device("cpu"))
    exact = exact_gradients(row, on_cpu)
    batch = {key: value.to(device) for key, value in on_cpu.items()}
    for dtype in types:
        stock = stock_gradients(row, batch, TYPES[dtype])
        for kernel in kernels:
            subject = _subject(name, dtype, kernel)
            with report.failing("clipped sum", subject):
                placed = KernelOnDevice(row, kernel, batch, TYPES[dtype])
                for phase in PHASES:
                    _check_sum(report, placed, exact, stock, phase, subject)
                _check_one_left_out(report, placed, exact, subject)


def _active(placed: KernelOnDevice, exact: list[Grads], phase: str) -> tuple[frozenset[str], float]:
    """Return a phase's active names, and the median norm of the exact gradients as C."""
    names = active_names(placed.engine.parameters, PHASES[phase])
    norms = torch.stack([joint_norm([grads[name] for name in names]) for grads in exact])
    return names, float(norms.median())


def _check_sum(
    report: Report,
    placed: KernelOnDevice,
    exact: list[Grads],
    stock: list[Grads],
    phase: str,
    subject: Subject,
) -> None:
    names, clip_norm = _active(placed, exact, phase)
    expected = sum_of_clipped(exact, names, clip_norm)
    rounding = relative_error(sum_of_clipped(stock, names, clip_norm), expected)
    sums = placed.clipped_sum(names, clip_norm, list(range(EXAMPLES)))
    error = relative_error(sums, expected)
    limit = 1e-5 if placed.dtype == torch.float32 else max(2 * rounding, 1e-2)
    wide = all(value.dtype == torch.float32 for value in sums.values())
    values = {"phase": phase, "error": error, "stock_error": rounding, "limit": limit}
    report.add("clipped sum", error <= limit and wide, **subject, **values)


def _check_one_left_out(
    report: Report, placed: KernelOnDevice, exact: list[Grads], subject: Subject
) -> None:
    names, clip_norm = _active(placed, exact, "both")
    everyone = list(range(EXAMPLES))
    sums, moved = placed.clipped_sum(names, clip_norm, everyone), []
    for i in everyone:
        fewer = placed.clipped_sum(names, clip_norm, [j for j in everyone if j != i])
        moved.append(float(joint_norm([sums[n] - fewer[n] for n in names])) / clip_norm)
    # bf16 may round the other examples' gradients differently in a smaller batch: no limit there
    ok = max(moved) <= 1 + 1e-5 if placed.dtype == torch.float32 else None
    report.add("one left out", ok, **subject, largest_change_over_clip_norm=max(moved))
    change = float((placed.losses()[1:] - placed.losses(first=1)).abs().max())
    report.add("loss with one fewer", None, **subject, largest_change=change)


def check_steps(
    report: Report, device: torch.device, name: str, row: Row, kernels: list[str], types: list[str]
) -> None:
    """Take LA-LoRA's steps B, A, B, A: resting factors keep their bits, the host never waits."""
    for dtype, kernel, optimizer in product(types, kernels, ("adamw", "sgd")):
        subject = _subject(name, dtype, kernel)
        with report.failing("steps", subject):
            backbone = make_backbone(name, row, kernel, device, TYPES[dtype])
            _check_steps(report, backbone, name, optimizer, subject)


def _check_steps(
    report: Report, backbone: Backbone, name: str, optimizer_name: str, subject: Subject
) -> None:
    data = make_data(name)
    optimizer = make_optimizer(backbone, local_settings(optimizer_name), 0.0)
    before = {n: p.detach().clone() for n, p in backbone.engine.parameters.items()}
    wrong: list[str] = []

    def compare(names: frozenset[str]) -> None:
        for n, parameter in backbone.engine.parameters.items():
            same = torch.equal(parameter.detach(), before[n])
            if same == (n in names) or not bool(parameter.isfinite().all()):
                wrong.append(n)
            before[n] = parameter.detach().clone()

    take_steps(backbone, data, optimizer, 4, compare)
    found = {"optimizer": optimizer_name, "wrong": len(wrong)}
    report.add("resting factor", not wrong, **subject, **found)
    if backbone.device.type == "cuda":
        where = _first_wait(partial(take_steps, backbone, data, optimizer, 2))
        report.add("no wait", where is None, **subject, optimizer=optimizer_name, where=where)


def _first_wait(steps: Callable[[], None]) -> str | None:
    """Return the source line where the host first waits for the GPU; None: nowhere."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in frames[-3:]]
        return " < ".join([str(error).splitlines()[0][:80], *reversed(places)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _deviations(x: Tensor) -> dict[str, float]:
    """Return the deviations of a draw's moments from N(0, 1), in standard errors."""
    n, std = x.numel(), float(x.std())
    fourth = float((x - x.mean()).pow(4).mean()) / std**4
    neighbours = float((x[:-1] * x[1:]).mean()) / std**2
    beyond, share = float((x.abs() > 3).double().mean()), 0.0026997960632601866
    return {
        "z_mean": float(x.mean()) / std * n**0.5,
        "z_std": (std - 1) * (2 * n) ** 0.5,
        "z_kurtosis": (fourth - 3) * (n / 24) ** 0.5,
        "z_neighbours": neighbours * n**0.5,
        "z_beyond_3_sigma": (beyond - share) / (share * (1 - share) / n) ** 0.5,
    }


def check_noise(report: Report, device: torch.device) -> None:
    """Compare releases of noise alone with N(0, (z·C)²) / (q·n)."""
    shapes = {"a.lora_A.w": (8, 4096), "b.lora_B.w": (4096, 8), "head.w": (999, 1001)}
    zeros = {n: torch.zeros(s, device=device) for n, s in shapes.items()}

    def release(rng: np.random.Generator) -> Tensor:
        noised = add_noise(zeros, noise_std=0.6, expected_batch=20.0, rng=rng)
        return torch.cat([g.flatten() for g in noised.values()]).double() * 20.0 / 0.6

    stream = secure()
    first, second, other = release(stream), release(stream), release(secure())
    for which, draw in {"first": first, "second": second, "other stream": other}.items():
        found = _deviations(draw)
        right = all(abs(value) < STANDARD_ERRORS for value in found.values())
        values = {"entries": draw.numel(), "std_of_entries": float(draw.std())}
        report.add("noise", right, release=which, **values, **found)
    for pair, (a, b) in {"two releases": (first, second), "two streams": (first, other)}.items():
        z, equal = float((a * b).mean()) * first.numel() ** 0.5, int((a == b).sum())
        right = abs(z) < STANDARD_ERRORS and equal < 20
        report.add("noise, independent", right, pair=pair, z_correlation=z, equal_entries=equal)
    report.add("noise, seeded", torch.equal(release(seeded(1, "n")), release(seeded(1, "n"))))
    report.add("noise, sums kept", all(not bool(z.any()) for z in zeros.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", default="", help="first letters of the models' names")
    parser.add_argument(
        "--kernels",
        default="fused,merged,plain",
        help="values of lora.kernel; compiled takes minutes per model, clipped sums only",
    )
    parser.add_argument("--types", default=",".join(TYPES), help="number types")
    parser.add_argument("--output", type=Path, default=None, help="JSON file of the findings")
    args = parser.parse_args()
    args.kernels, args.types = args.kernels.split(","), args.types.split(",")
    if not {*args.kernels} <= {*KERNELS} or not {*args.types} <= {*TYPES}:
        parser.error(f"kernels: {', '.join(KERNELS)}; types: {', '.join(TYPES)}")
    if not any(name.startswith(args.model) for name in MAKERS):
        parser.error(f"models: {'; '.join(MAKERS)}")
    return args


def main() -> None:
    """Run the checks; exit 1 if one fails."""
    args = _arguments()
    warnings.simplefilter("ignore")
    device, report, began = pick_device(args.device), Report(args.output), time.monotonic()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report.add("about", None, card=card, torch=torch.__version__, cuda=torch.version.cuda)
    check_noise(report, device)
    eager = [kernel for kernel in args.kernels if kernel != "compiled"]
    for name, row in rows(args.model):
        check_sums(report, device, name, row, args.kernels, args.types)
        check_steps(report, device, name, row, eager, args.types)
    verdicts = [row["ok"] for row in report.rows if row["ok"] is not None]
    counts = {"right": sum(verdicts), "wrong": verdicts.count(False)}
    report.add("in all", None, **counts, seconds=time.monotonic() - began)
    sys.exit(0 if all(verdicts) else 1)


if __name__ == "__main__":
    main()
