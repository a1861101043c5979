"""Gradients of whole weights from rows g and x, compared with formed gradients in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.oracle import (
    Losses,
    assert_engine_is_right,
    clipped_by_loop,
    joint,
    loop_gradients,
    randomise,
    trained,
    without_engine,
)
from lalora_app.adapter.whole_linear import WholeLinear
from lalora_app.private_step import gradients
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.gradients import PerExampleGrads, RowsBlock
from lalora_app.private_step.layout_check import check_layout
from lalora_app.private_step.mechanism import clipped_sum

NAME = "layer.lora_W.weight"
WIDTH, EXAMPLES = 6, 4
PHASES = [("W", 3), ("", 2), ("W", 4), ("W", 1)]


class Net(nn.Module):
    """A model (examples, ..., 6) -> (examples, 3): a whole layer, called several times."""

    def __init__(self, calls: int = 1, windows: int = 1):
        super().__init__()
        self.calls, self.windows = calls, windows
        self.layer = WholeLinear(nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.windows > 1:  # the first axis is (examples · windows), as in Swin
            x = x.reshape(shape[0] * self.windows, -1, WIDTH)
        for _ in range(self.calls):
            x = torch.tanh(self.layer(x))
        x = x.reshape(shape)
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


def losses_of(*shape: int) -> Losses:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, *shape, WIDTH, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 2, 1])

    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        inputs = x[indices].to(next(model.parameters()).dtype)
        return nn.functional.cross_entropy(model(inputs), labels[indices], reduction="none")

    return losses


def net(*arguments: int) -> nn.Module:
    return randomise(Net(*arguments))


def formed(g: Tensor, x: Tensor) -> Tensor:
    """Return (examples, out, in): Σ_t g_t x_tᵀ, row by row, in float64."""
    total = torch.zeros(len(g), g.shape[2], x.shape[2], dtype=torch.float64)
    for i in range(len(g)):
        for row_g, row_x in zip(g[i].double(), x[i].double(), strict=True):
            total[i] += torch.outer(row_g, row_x)
    return total


def as_grads(g: Tensor, x: Tensor) -> PerExampleGrads:
    return PerExampleGrads((RowsBlock(NAME, g, x),))


# Few rows use Gram matrices, many rows form a matrix per example: 12 rows of width 6 do.
@pytest.mark.parametrize("shape", [(), (2,), (12,), (3, 4)], ids=["one", "few", "many", "4-D"])
@pytest.mark.parametrize("calls", [1, 3])
def test_any_leading_shape_and_number_of_calls(shape, calls):
    model = net(calls)
    assert set(trained(model)) == {NAME, "head.weight", "head.bias"}
    assert_engine_is_right(model, losses_of(*shape), ways=[("plain", False)], phases=PHASES)


@pytest.mark.parametrize("rows", [2, 24])
def test_the_windows_of_an_image_are_clipped_as_one_example(rows):
    assert_engine_is_right(net(2, 2), losses_of(rows), ways=[("plain", False)], phases=PHASES)


def test_the_layout_check_passes_and_restores_the_weights():
    model, losses = net(2), losses_of(5)
    before = copy.deepcopy(model.state_dict())
    check_layout(KernelEngine(model, trained(model)), lambda rows: losses(model, rows), 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_that_do_not_divide_into_examples_are_refused():
    model, losses = net(), losses_of(5)
    engine = KernelEngine(model, trained(model))
    with pytest.raises(LayoutError, match=r"do not divide into 3 examples"):
        engine.gradients(lambda: losses(model, [0, 1, 2, 3])[:3], 3)


sizes = st.tuples(*(st.integers(1, top) for top in (4, 9, 5, 5)))


@given(sizes=sizes, seed=st.integers(0, 2**31), large=st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_norms_and_sums_are_those_of_formed_gradients(sizes, seed, large):
    examples, rows, out, inner = sizes
    generator = torch.Generator().manual_seed(seed)
    g = large * torch.randn(examples, rows, out, dtype=torch.float64, generator=generator)
    x = torch.randn(examples, rows, inner, dtype=torch.float64, generator=generator)
    scales = torch.rand(examples, dtype=torch.float64, generator=generator)
    block, expected = RowsBlock(NAME, g, x), formed(g, x)
    lengths = (g.norm(dim=2) * x.norm(dim=2)).sum(1)
    off = (block.norms() - expected.flatten(1).norm(dim=1)).abs()
    assert bool((off <= 1e-7 * lengths).all())
    rounding = 1e-13 * float(lengths.sum())
    found = block.weighted_sum(scales)[NAME]
    assert (found - (scales[:, None, None] * expected).sum(0)).norm() <= rounding
    assert (block.dense()[NAME] - expected).norm() <= rounding


@pytest.mark.parametrize("rows", [2, 12], ids=["by Gram matrices", "by products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_example_moves_the_sum_by_more_than_the_clip_norm(rows, dtype):
    torch.manual_seed(0)
    g, x = (torch.randn(5, rows, 6).to(dtype) for _ in range(2))
    x += 1  # rows of an example are alike, so the products of two of them count
    norms = formed(g, x).flatten(1).norm(dim=1)
    clip_norm = float(norms.min()) / 2
    whole = clipped_sum(as_grads(g, x), clip_norm)[NAME]
    assert whole.dtype == torch.float32
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        fewer = clipped_sum(as_grads(g[rest], x[rest]), clip_norm)[NAME]
        assert 0.999 * clip_norm <= (whole - fewer).double().norm() <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize("rows", [2, 12], ids=["by Gram matrices", "by products"])
@pytest.mark.parametrize("apart", [2.0**-8, 2.0**-16, 2.0**-22, 0.0])
def test_rows_that_nearly_cancel_are_not_clipped_to_more_than_the_clip_norm(rows, apart):
    torch.manual_seed(0)
    g, x = torch.randn(1, 1, 6), torch.randn(1, 1, 6)
    signs = torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None]
    g, x = signs * g, torch.where(signs > 0, x, x * (1 + apart))
    exact = formed(g, x).norm()
    norm = as_grads(g, x).norms()[0]
    assert exact <= norm <= exact + 1e-5 * (g.norm(dim=2) * x.norm(dim=2)).sum()
    for clip_norm in (0.5 * float(norm), 1e-3 * float(norm)):
        assert clipped_sum(as_grads(g, x), clip_norm)[NAME].double().norm() <= clip_norm


def test_limits():
    torch.manual_seed(0)
    g, x = torch.randn(3, 6, 7).double(), torch.randn(3, 6, 5).double()
    expected = formed(g, x)
    one_token = RowsBlock(NAME, g[:, :1], x[:, :1]).norms()
    torch.testing.assert_close(one_token, g[:, 0].norm(dim=1) * x[:, 0].norm(dim=1))
    unclipped = clipped_sum(as_grads(g, x), float("inf"))[NAME]
    torch.testing.assert_close(unclipped, expected.sum(0))
    alone = clipped_sum(as_grads(g[:1], x[:1]), 0.25)[NAME].norm()
    torch.testing.assert_close(alone, torch.tensor(0.25, dtype=torch.float64), rtol=2e-5, atol=0)
    rank_one = RowsBlock(NAME, g[:, :1].expand_as(g), x).norms()  # g₁ (Σ_t x_t)ᵀ
    torch.testing.assert_close(rank_one, g[:, 0].norm(dim=1) * x.sum(1).norm(dim=1))
    nothing = RowsBlock(NAME, torch.zeros_like(g), x)
    assert not nothing.norms().any()
    assert not clipped_sum(PerExampleGrads((nothing,)), 1.0)[NAME].any()


@pytest.mark.parametrize("rows", [2, 12])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_the_input_stays(rows):
    torch.manual_seed(0)
    g, x = torch.randn(4, rows, 6), torch.randn(4, rows, 6)
    expected = clipped_sum(as_grads(g[2:], x[2:]), 1.0)[NAME]
    g[0, 0, 0], x[1, 1, 1] = float("inf"), float("nan")
    before = x.clone()
    torch.testing.assert_close(clipped_sum(as_grads(g, x), 1.0)[NAME], expected)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


class Largest(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = found if isinstance(found, tuple | list) else (found,)
        sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return found


@pytest.mark.parametrize("rows", [2, 64])
def test_no_tensor_holds_the_gradients_of_all_examples(rows, monkeypatch):
    monkeypatch.setattr(gradients, "_TEMPORARY", 4096)
    g, x = torch.randn(32, rows, 32), torch.randn(32, rows, 32)
    with Largest() as seen:
        clipped_sum(as_grads(g, x), 1.0)
    assert seen.entries <= 2 * 4096 < 32**3


def test_the_engine_clips_whole_weights_and_head_together():
    model, losses = net(2), losses_of(5)
    rows = loop_gradients(without_engine(model), losses, [0, 1, 2, 3])
    engine = KernelEngine(model, trained(model))
    grads = engine.gradients(lambda: losses(model, [0, 1, 2, 3]), 4)
    clip_norm = 0.3 * float(grads.norms().min())
    found, expected = clipped_sum(grads, clip_norm), clipped_by_loop(rows, clip_norm)
    assert joint([found[n] - expected[n] for n in rows]) <= 1e-12 * joint(list(expected.values()))
    assert joint(list(found.values())) <= 4 * clip_norm
