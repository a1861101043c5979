"""Time and peak memory of the private step against stock PEFT and Opacus, whole models.

The variants of a cell (model, phase, batch) alternate in one process; ratios are to stock PEFT
without privacy in the same repetition. Random weights in bf16, no download.
"""

import functools
import gc
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from cells import Outcome, Plan, measure_cell, ratios, timed
from models import TINY_ROWS, build
from one_step import Cell, copied

from gpu_parts.settings import Row, Settings, Unit
from lalora_app.models.device import pick_device
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.mechanism import clipped_sum

WHOLE = (
    "roberta-base-whole",
    "swin-tiny-whole",
    "vit-base-whole",
    "llama-1b-whole",
    "swin-base-whole",
)
# kind of a cell -> its variants, stock PEFT first
VARIANTS_OF = {
    "eager": ("peft", "fused", "merged", "opacus-hooks", "opacus-ghost"),
    "compiled": ("peft", "peft-compiled", "compiled"),
    "cuda graph": ("peft", "peft-graph", "fused", "fused-graph"),
}
_MAY_FAIL = frozenset({"opacus-hooks", "opacus-ghost", "peft-graph", "fused-graph"})
_CELL_SECONDS = 6.0  # of repetitions in a cell
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class StepCell:
    """One comparison: the model, the trained factors, the batch size and the kind of variants."""

    model: str
    phase: str
    batch: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.model}, phase {self.phase}, batch {self.batch}"


def _plan(settings: Settings) -> Plan:
    few = settings.quick
    return Plan(
        repetitions=2 if few else 20,
        slow_repetitions=2 if few else 20,
        device=pick_device(settings.device),
        dtype=_DTYPE,
        counts=("peak",),
        seconds=_CELL_SECONDS,
    )


def _row(cell: StepCell, variant: str, outcomes: dict[str, Outcome]) -> Row:
    """Return the row of a variant: times in milliseconds, and ratios as median, least and most."""
    outcome, base = outcomes[variant], outcomes["peft"]
    subject = {**vars(cell), "variant": variant}
    error = outcome.error or (base.error and f"stock PEFT {base.error}")
    if error:
        return subject | {"error": error, "ok": None if variant in _MAY_FAIL else False}
    wall, cpu = (ratios(getattr(outcome, c), getattr(base, c)) for c in ("wall", "cpu"))
    peak, of_base = outcome.counts["peak"], base.counts["peak"]
    return subject | {
        "wall_ratio": round(statistics.median(wall), 4),
        "wall_least": round(min(wall), 4),
        "wall_most": round(max(wall), 4),
        "wall_ms": round(1000 * statistics.median(outcome.wall.values()), 3),
        "cpu_ratio": round(statistics.median(cpu), 4),
        "peak_ratio": round(peak / of_base, 4) if peak and of_base else None,
        "peak_mib": round(peak / 2**20, 1) if peak else None,
        "repetitions": len(wall),
    }


def _to_compiled_peft(outcomes: dict[str, Outcome]) -> Row:
    """Return the ratio of the compiled private step to compiled PEFT; {} without it."""
    own, stock = outcomes["compiled"], outcomes["peft-compiled"]
    if not (own.wall and stock.wall):
        return {}
    return {"wall_to_compiled_peft": round(statistics.median(ratios(own.wall, stock.wall)), 4)}


def measure(cell: StepCell, settings: Settings) -> Iterator[Row]:
    """Measure one cell; a row per variant, with the error of one that does not run."""
    torch.compiler.reset()  # compiled functions of PEFT share torch's limit of compilations
    backend = "aot_eager" if settings.quick else "inductor"  # aot_eager needs no C++ compiler
    names = VARIANTS_OF[cell.kind]
    with patch("torch.compile", functools.partial(torch.compile, backend=backend)):
        outcomes = measure_cell(cell.model, cell.phase, cell.batch, names, _plan(settings))
    for name in names:
        row = _row(cell, name, outcomes)
        if name == "compiled":
            row |= _to_compiled_peft(outcomes)
        yield row | ({"backend": backend} if cell.kind == "compiled" else {})
    del outcomes
    gc.collect()
    torch.cuda.empty_cache()


def measure_attention(model: str, batch: int, settings: Settings) -> Iterator[Row]:
    """Time fused steps with and without cuDNN's attention, on batches of one and of many sizes.

    cuDNN plans anew for every (examples, tokens), and a Poisson batch nearly always has a new size.
    A CPU has no cuDNN; there the rows say nothing.
    """
    device = pick_device(settings.device)
    built = build(model, device, _DTYPE)
    cell = Cell(built, "B", built.make_batch(batch, device), dtype=_DTYPE)
    copy, parameters, active = copied(cell)
    keeper = KernelEngine(copy, parameters, "fused")
    keeper.activate(frozenset(active))

    def step(examples: int) -> None:
        part = {key: value[:examples] for key, value in cell.batch.items()}
        clipped_sum(keeper.gradients(lambda: cell.losses(copy, part), examples), cell.clip_norm)

    cases = [(cudnn, sizes) for cudnn in (True, False) for sizes in ("one", "many")]
    times: dict[tuple[bool, str], list[tuple[float, float]]] = {case: [] for case in cases}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    step(batch)
    for i in range(1, 3 if settings.quick else 20):
        for cudnn, sizes in cases:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            examples = batch - i if sizes == "many" else batch
            times[cudnn, sizes].append(timed(functools.partial(step, examples), device))
    torch.backends.cuda.enable_cudnn_sdp(before)
    for (cudnn, sizes), found in times.items():
        yield {
            "kind": "attention",
            "model": model,
            "batch": batch,
            "variant": "fused",
            "cudnn_attention": cudnn,
            "batch_sizes": sizes,
            "wall_ms": round(1000 * statistics.median(wall for _, wall in found), 3),
            "cpu_ms": round(1000 * statistics.median(cpu for cpu, _ in found), 3),
            "repetitions": len(found),
        }


def _cells(models: Sequence[str], batches: Sequence[int], settings: Settings) -> list[StepCell]:
    """Return all cells, the most wanted first."""
    small, large = batches
    cells = [StepCell(model, "B", small, "eager") for model in models]
    cells += [StepCell(models[0], "B", small, "cuda graph")] if settings.on_gpu else []
    cells += [StepCell(model, "B", large, "eager") for model in models]
    if settings.quick:  # one compiled model only: capturing a graph takes most of the time
        return [*cells, StepCell(models[0], "B", small, "compiled")]
    cells += [StepCell(model, "B", small, "compiled") for model in models]
    cells += [StepCell(model, "A", small, "eager") for model in models]
    cells += [StepCell(model, "A", large, "eager") for model in models]
    return cells + [StepCell(model, "B", large, "compiled") for model in models]


def units(settings: Settings) -> list[Unit]:
    """Return one unit per cell, and cuDNN's attention after the first cells."""
    warnings.simplefilter("ignore")  # of the compared libraries
    models, batches = (tuple(TINY_ROWS), (4, 8)) if settings.quick else (WHOLE, (64, 256))
    cells = _cells(models, batches, settings)
    found = [Unit(str(cell), functools.partial(measure, cell, settings)) for cell in cells]
    attention = functools.partial(measure_attention, models[0], batches[0], settings)
    found.insert(len(models), Unit("attention", attention))
    return found
