"""The largest batch of a step that fits, by doubling and halving.

On a GPU: in its memory, with two copies of the model, as every variant copies it. On a CPU, to try
the search: the step's own tensors stay below a limit.
"""

import functools
import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from measure import peak_bytes
from models import TINY_ROWS, Batch, build
from one_step import Cell
from variants import VARIANTS

from gpu_parts.settings import Row, Settings, Unit
from lalora_app.models.device import pick_device

_MODELS = ("roberta-base-whole", "swin-tiny-whole", "vit-base-whole", "llama-1b-whole")
_VARIANTS = ("peft", "fused", "merged", "opacus-ghost")
_BASE = 16  # examples that are drawn; a larger batch repeats them
_CPU_LIMIT = 2**20  # bytes of the step's own tensors
_DTYPE = torch.bfloat16


def largest(fits: Callable[[int], bool], start: int, most: int = 2**16) -> int:
    """Return the largest batch that fits, to within 1/16; 0 if not even one example does.

    Args:
        fits: whether a batch fits; one that is smaller than a fitting one fits too.
        start: the first batch to try.
        most: no larger batch is tried.
    """
    good, bad = 0, start
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 16) and bad <= most:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _repeated(batch: Batch, examples: int) -> Batch:
    chosen = torch.arange(examples, device=batch["labels"].device) % _BASE
    return {key: value[chosen] for key, value in batch.items()}


def _peak_of_step(cell: Cell, variant: str, device: torch.device) -> int:
    return peak_bytes(VARIANTS[variant](cell).step, device)


def _fits(model: str, variant: str, device: torch.device) -> Callable[[int], bool]:
    """Return a function that tries one step of a variant on batches of the given size."""
    row = build(model, device, _DTYPE)
    base = row.make_batch(_BASE, device)

    def fits(examples: int) -> bool:
        cell = Cell(row, "B", _repeated(base, examples), dtype=_DTYPE)
        try:
            peak = _peak_of_step(cell, variant, device)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return device.type == "cuda" or peak <= _CPU_LIMIT

    return fits


def measure(model: str, variant: str, settings: Settings) -> Iterator[Row]:
    """Yield the largest batch of one variant."""
    device = pick_device(settings.device)
    whole = torch.cuda.get_device_properties(device).total_memory if settings.on_gpu else _CPU_LIMIT
    row: Row = {"model": model, "phase": "B", "variant": variant, "limit_mib": whole // 2**20}
    try:
        yield row | {"largest_batch": largest(_fits(model, variant, device), _BASE)}
    except Exception as error:
        if not variant.startswith("opacus"):
            raise
        yield row | {"largest_batch": None, "error": f"{type(error).__name__}: {error}"[:200]}


def units(settings: Settings) -> list[Unit]:
    """Return one unit per model and variant."""
    warnings.simplefilter("ignore")  # of the compared libraries
    models = list(TINY_ROWS)[:1] if settings.quick else list(_MODELS)
    variants = _VARIANTS[:2] if settings.quick else _VARIANTS
    return [
        Unit(f"{model}, {variant}", functools.partial(measure, model, variant, settings))
        for model in models
        for variant in variants
    ]
