"""Check, count and time all variants of one benchmark cell, in random order per repetition."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import measure
import torch
from models import build
from one_step import Cell, Sums, Variant
from variants import PRIVATE, VARIANTS, median_norm

Ratios = list[float]
COUNTS = ("flops", "kernel", "saved", "peak")
_LEAST_REPETITIONS = 5
SLOW = frozenset({"peft-both", "merged", "plain", "vmap"})  # no gate hangs on their exact time


@dataclass
class Outcome:
    """The result of one variant: counts and seconds, or the reason why there are none."""

    error: str | None = None
    counts: dict[str, int | None] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)  # repetition -> seconds
    wall: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement.

    Attributes:
        repetitions: the number of timed steps of a variant.
        slow_repetitions: the same for variants without a required speed.
        device: the device.
        dtype: the number type of autocast.
        counts: the counted values; the others are None.
        seconds: after this time, no repetition beyond the fifth begins.
    """

    repetitions: int
    slow_repetitions: int
    device: torch.device
    dtype: torch.dtype
    counts: tuple[str, ...] = COUNTS
    seconds: float = math.inf

    def repetitions_of(self, variant: str) -> int:
        """Return the number of repetitions of a variant."""
        few = min(self.slow_repetitions, self.repetitions)
        return few if variant in SLOW else self.repetitions


def difference(found: Sums, expected: Sums) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all tensors together."""
    off = [(found[name] - value).double().norm() for name, value in expected.items()]
    whole = [value.double().norm() for value in expected.values()]
    return float(torch.stack(off).norm() / torch.stack(whole).norm())


def _first_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"fails: {type(error).__name__}: {' '.join(lines[0].split()[:12])}"


def _count(step: Callable[[], None], counter: Callable[..., int], *arguments: Any) -> int | None:
    try:
        return counter(step, *arguments)
    except RuntimeError:  # torch.func allows no saved-tensor hooks
        return None


def _counts(name: str, variant: Variant, plan: Plan) -> dict[str, int | None]:
    counters = {
        "flops": (measure.flops,),
        "kernel": (measure.kernels,),
        "saved": (measure.saved_bytes, variant.model),
        "peak": (measure.peak_bytes, plan.device),
    }
    found: dict[str, int | None] = dict.fromkeys(COUNTS)
    for count in plan.counts:
        counter, *arguments = counters[count]
        if name == "merged":  # an update under a dispatch mode leaves its cached weights valid
            variant.step()
        found[count] = _count(variant.step, counter, *arguments)
    return found


def _prepared(name: str, cell: Cell, expected: Sums, plan: Plan) -> tuple[Variant | None, Outcome]:
    """Build a variant, compare its clipped sum with the reference, and count its step."""
    tolerance = 1e-3 if cell.dtype == torch.float32 else 5e-2
    try:
        variant = VARIANTS[name](cell)
        off = difference(variant.sums(), expected) if name in PRIVATE else 0.0
        variant.step()
    except Exception as error:  # whatever the library raises is the result
        return None, Outcome(error=_first_words(error))
    if not off <= tolerance:
        return None, Outcome(error=f"wrong: clipped sum off by {off:.2g}")
    return variant, Outcome(counts=_counts(name, variant, plan))


def timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return a step's CPU seconds on the host, and its wall-clock seconds (GPU: device seconds)."""
    if device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        return time.process_time() - cpu, time.perf_counter() - wall
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    begin.record()
    step()
    end.record()
    cpu = time.process_time() - cpu
    torch.cuda.synchronize(device)
    return cpu, begin.elapsed_time(end) / 1000


def measure_cell(
    model: str, phase: str, batch: int, names: Sequence[str], plan: Plan
) -> dict[str, Outcome]:
    """Measure every variant of a cell, in another order in each repetition."""
    row = build(model, plan.device, plan.dtype)
    cell = Cell(row, phase, row.make_batch(batch, plan.device), dtype=plan.dtype)
    cell = replace(cell, clip_norm=median_norm(cell))
    expected = VARIANTS["plain"](cell).sums()
    prepared = {name: _prepared(name, cell, expected, plan) for name in names}
    running = {name: variant for name, (variant, _) in prepared.items() if variant}
    outcomes = {name: outcome for name, (_, outcome) in prepared.items()}
    shuffle, began = random.Random(0).shuffle, time.monotonic()
    for repetition in range(plan.repetitions):
        if repetition >= _LEAST_REPETITIONS and time.monotonic() - began > plan.seconds:
            break
        order = [n for n in running if repetition < plan.repetitions_of(n)]
        shuffle(order)
        for name in order:
            cpu, wall = timed(running[name].step, plan.device)
            outcomes[name].cpu[repetition], outcomes[name].wall[repetition] = cpu, wall
    return outcomes


def ratios(seconds: dict[int, float], reference: dict[int, float]) -> Ratios:
    """Return the ratio to the reference in the same repetition."""
    return [value / reference[repetition] for repetition, value in seconds.items()]


def to_rows(model: str, phase: str, batch: int, outcomes: dict[str, Outcome]) -> list[dict]:
    """Return one JSON row per measured variant; ratios are to stock PEFT in the same cell."""
    base, rows = outcomes["peft"], []
    for name, outcome in outcomes.items():
        if outcome.error:
            continue
        row: dict[str, Any] = {"model": model, "phase": phase, "batch": batch, "variant": name}
        for clock in ("cpu", "wall"):
            found = ratios(getattr(outcome, clock), getattr(base, clock))
            row[f"{clock}_ratio"] = round(statistics.median(found), 4)
        for count in COUNTS:
            own, reference = outcome.counts[count], base.counts[count]
            row[f"{count}_ratio"] = round(own / reference, 4) if own and reference else None
        rows.append(row | {"repetitions": len(outcome.cpu)})
    return rows
