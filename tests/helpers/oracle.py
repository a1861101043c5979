"""The slow, plain route to per-example gradients, and the engines held against it."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lalora_app.adapter.factors import active_names
from lalora_app.private_step.compiled_engine import CompiledEngine
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.gradients import FlatBlock, PerExampleGrads, StoredShape
from lalora_app.private_step.mechanism import CLIP_MARGIN, clipped_sum

TOLERANCE = 1e-12
# Phases and batch sizes in the order they are run: toggled, repeated, growing and shrinking.
TOGGLED = [("B", 3), ("A", 2), ("B", 4), ("AB", 1), ("A", 4), ("AB", 3)]
Losses = Callable[[nn.Module, list[int]], Tensor]
Ways = Sequence[tuple[str, bool]]
WAYS: Ways = (
    ("plain", False),
    ("fused", False),
    ("fused", True),
    ("merged", False),
    ("expanded", False),
)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_engine(model: nn.Module) -> nn.Module:
    """A copy whose layers compute as torch wrote them."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        vars(module).pop("forward", None)
    return plain


def loop_gradients(model: nn.Module, losses: Losses, indices: list[int]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in trained(model)}
    for i in indices:
        model.zero_grad()
        losses(model, [i]).sum().backward()
        for name, parameter in trained(model).items():
            rows[name].append(parameter.grad.clone())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def blocks(grads: dict[str, Tensor]) -> PerExampleGrads:
    slots = {name: {name: StoredShape(tuple(g.shape[1:]))} for name, g in grads.items()}
    return PerExampleGrads(
        tuple(FlatBlock(slots[n], g.flatten(1).clone()) for n, g in grads.items())
    )


def joint(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each example's joint gradient to ``tolerance``, and each tensor's part of it on its own."""
    assert {n: g.shape for n, g in found.items()} == {n: expected[n].shape for n in found}
    off = {name: grad.double() - expected[name] for name, grad in found.items()}
    for i in range(len(next(iter(off.values())))):
        whole = joint([expected[name][i] for name in found])
        assert whole > 0
        assert joint([grad[i] for grad in off.values()]) <= tolerance * whole
        for name, grad in off.items():
            assert expected[name][i].norm() > 0, name
            assert grad[i].norm() <= max(1e-8, 5 * tolerance) * expected[name][i].norm(), name


def clipped_by_loop(rows: dict[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Σ of the examples, each scaled to a joint norm of at most C."""
    sums = {name: torch.zeros_like(grad[0]) for name, grad in rows.items()}
    for i in range(len(next(iter(rows.values())))):
        norm = joint([grad[i] for grad in rows.values()])
        for name, grad in rows.items():
            sums[name] += min(1.0, clip_norm * CLIP_MARGIN / norm) * grad[i]
    return sums


def assert_release_is_right(grads: PerExampleGrads, rows: dict[str, Tensor]) -> None:
    """Norms and clipped sum at C = the median norm, and no example moves it by more than C."""
    size = len(next(iter(rows.values())))
    each = [joint([g[i] for g in rows.values()]) for i in range(size)]
    norms = torch.tensor(each, dtype=torch.float64)
    torch.testing.assert_close(grads.norms(), norms, rtol=1e-12, atol=0)
    clip_norm = float(norms.median())
    found, expected = clipped_sum(grads, clip_norm), clipped_by_loop(rows, clip_norm)
    off = joint([found[name] - expected[name] for name in rows])
    assert off <= TOLERANCE * joint(list(expected.values()))


def make_engine(model: nn.Module, kernel: str, *, flat: bool = False) -> KernelEngine:
    if kernel == "expanded":
        return CompiledEngine(model, trained(model))
    return KernelEngine(model, trained(model), kernel, flat=flat)


def unchanged(model: nn.Module) -> None:
    """Leave a model as it is."""


def assert_engine_is_right(
    model: nn.Module,
    losses: Losses,
    *,
    examples: int = 4,
    ways: Ways = WAYS,
    phases: Sequence[tuple[str, int]] = TOGGLED,
    prepare: Callable[[nn.Module], None] = unchanged,
) -> None:
    """Run every phase on changing batches through every kernel, each against the loop.

    ``prepare`` changes a copy of the model before its engine is made; the loop runs without it.
    """
    plain = loop_gradients(without_engine(model), losses, list(range(examples)))
    for kernel, flat in ways:
        adapted = without_engine(model)
        prepare(adapted)
        parameters = trained(adapted)
        engine = make_engine(adapted, kernel, flat=flat)
        for factors, size in phases:
            names = active_names(parameters, frozenset(factors))
            engine.activate(names)
            indices = [(size + i) % examples for i in range(size)]
            found = engine.gradients(lambda m=adapted, i=indices: losses(m, i), size)
            expected = {name: plain[name][indices] for name in names}
            assert_equal(found.dense(), expected, TOLERANCE)
            assert_release_is_right(found, expected)
            assert all(p.grad is None for p in adapted.parameters())


def randomise(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Random factors and head in float64: B at zero would hide the gradient of A."""
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in trained(model).values():
        nn.init.normal_(parameter, std=std)
    return model
