"""Limits of the private step's cost, by reproducible counts instead of times.

Layers are narrow; the ratios depend little on the width. FLOPs and bytes are counted with realistic
numbers of tokens. Kernels are counted with realistic numbers of blocks, because every step has a
fixed number of about 25 small kernels.
"""

import sys
from functools import cache

import pytest
import torch
from torch import nn

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import measure
import models
import one_step
import variants

EXAMPLES = 2
BUILDERS = {
    "roberta": lambda: models.roberta(layers=4, width=96, heads=4, tokens=128),
    "swin": lambda: models.swin(224, 7, (2, 1, 1, 1), width=32),
    "swin-tiny": lambda: models.swin(224, 7, (2, 2, 6, 2), width=32),
    "roberta-deep": lambda: models.roberta(layers=12, width=48, heads=4, tokens=8),
    "swin-deep": lambda: models.swin(64, 2, (2, 2, 6, 2), width=32),
}
STEPS = {
    "peft": variants.peft,
    "plain": lambda cell: variants.engine(cell, "plain", flat=False),
    "fused": lambda cell: variants.engine(cell, "fused", flat=False),
    "plain-flat": lambda cell: variants.engine(cell, "plain", flat=True),
    "fused-flat": lambda cell: variants.engine(cell, "fused", flat=True),
}
every_row = pytest.mark.parametrize("row", ["roberta", "swin"])
every_deep_row = pytest.mark.parametrize("row", ["roberta-deep", "swin-deep"])
every_phase = pytest.mark.parametrize("phase", one_step.PHASES)
each_kernel = pytest.mark.parametrize("kernel", ["plain", "fused"])


@cache
def cell(row: str, phase: str) -> one_step.Cell:
    built = BUILDERS[row]()
    return one_step.Cell(built, phase, built.make_batch(EXAMPLES, torch.device("cpu")))


@cache
def variant(row: str, phase: str, name: str) -> one_step.Variant:
    return STEPS[name](cell(row, phase))


@cache
def count(what: str, row: str, phase: str, name: str) -> int:
    """Return one count of a whole step: gradients, clipping, noise and SGD."""
    found = variant(row, phase, name)
    arguments = (found.step, found.model) if what == "saved_bytes" else (found.step,)
    return getattr(measure, what)(*arguments)


def ratio(what: str, row: str, phase: str, name: str) -> float:
    return count(what, row, phase, name) / count(what, row, phase, "peft")


@every_row
@every_phase
@each_kernel
def test_flops_are_those_of_the_ordinary_step(row, phase, kernel):
    assert ratio("flops", row, phase, kernel) <= 1.005


@every_deep_row
@every_phase
@pytest.mark.parametrize("buffers", ["", "-flat"])
@pytest.mark.parametrize(("kernel", "limit"), [("plain", 1.08), ("fused", 1.00)])
def test_kernels_are_those_of_the_ordinary_step(row, phase, buffers, kernel, limit):
    """With one buffer per shape (default on a CPU) and one buffer for all factors (GPU)."""
    assert ratio("kernels", row, phase, kernel + buffers) <= limit


@every_row
@every_phase
@each_kernel
def test_a_step_is_one_forward_and_one_backward(row, phase, kernel):
    found = variant(row, phase, kernel)
    assert measure.calls(found.step, found.model) == (1, 1)


@every_row
@every_phase
def test_autograd_keeps_no_more_bytes(row, phase):
    assert ratio("saved_bytes", row, phase, "fused") <= 1.00


@pytest.mark.parametrize("phase", ["A", "both"])
def test_the_b_phase_saves_activations_where_all_layers_are_adapted(phase):
    kept = count("saved_bytes", "swin-tiny", "B", "fused")
    assert kept <= 0.65 * count("saved_bytes", "swin-tiny", phase, "fused")


@every_row
@every_phase
@pytest.mark.parametrize("buffers", ["fused", "fused-flat"])
def test_peak_memory_grows_by_the_gradients_of_the_examples_only(row, phase, buffers):
    peak = count("peak_bytes", row, phase, "peft")
    extra = count("peak_bytes", row, phase, buffers) - peak
    entries = sum(grad.numel() for grad in variant(row, phase, "peft").sums().values())
    assert entries <= 400_000
    assert extra <= 0.05 * peak
    assert extra <= 1.1 * 4 * EXAMPLES * entries


def test_flops_of_in_place_products_are_counted():
    x, w, into = torch.ones(3, 4), torch.ones(4, 5), torch.zeros(3, 5)
    assert measure.flops(lambda: into.addmm_(x, w)) == 2 * 3 * 4 * 5
    batched = torch.zeros(2, 3, 5)
    assert measure.flops(lambda: batched.baddbmm_(x.expand(2, 3, 4), w.expand(2, 4, 5))) == 240
    assert measure.flops(lambda: torch.mv(x, w[:, 0])) == 2 * 3 * 4
    assert measure.flops(lambda: torch.dot(w[:, 0], w[:, 1])) == 2 * 4


def test_kernels_leave_out_views_and_allocations():
    x = torch.ones(3, 4)

    def step() -> None:
        torch.empty_like(x)
        x.detach().view(4, 3).T.unsqueeze(0).squeeze_()
        x.add_(1).mul(2)
        torch._foreach_add_([x, x.clone()], 1.0)

    assert measure.kernel_names(step) == ["add_", "mul", "clone", "_foreach_add_"]


def test_saved_bytes_count_a_storage_once_and_no_parameter():
    model = nn.Linear(4, 5)
    x = torch.ones(3, 4)
    assert measure.saved_bytes(lambda: model(x) + model(x[:1]), model) == 4 * 3 * 4


def test_peak_bytes_forget_what_was_freed():
    def step() -> None:
        for _ in range(3):
            torch.ones(256).add_(1)
        torch.ones(64).add(torch.ones(64))

    assert measure.peak_bytes(step) == 4 * 256
    assert measure.peak_bytes(lambda: torch.ones(64).add(torch.ones(64))) == 4 * 3 * 64


def test_calls_see_every_forward_and_backward():
    model, x = nn.Linear(4, 1), torch.ones(3, 4)
    assert measure.calls(lambda: model(x).sum().backward(), model) == (1, 1)
    assert measure.calls(lambda: (model(x) + model(x)).sum(), model) == (2, 0)
