"""The variants of one training step: stock PEFT, this package, Opacus and torch.func."""

from collections.abc import Callable, Mapping

import torch
from models import Batch
from one_step import Cell, Parameters, Sums, Variant, copied, in_cuda_graph
from torch import Tensor, nn

from lalora_app.blocks.adapters import wire_name
from lalora_app.private_step.attach import attach_kernels
from lalora_app.private_step.compiled_engine import CompiledEngine
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.mechanism import CLIP_MARGIN, clipped_sum


def _summed(cell: Cell, model: Callable[..., object], active: Parameters) -> Callable[[], Sums]:
    def sums() -> Sums:
        torch.autograd.backward(cell.losses(model).sum())
        return {name: parameter.grad for name, parameter in active.items()}

    return sums


def peft(cell: Cell, *, both: bool = False) -> Variant:
    """Stock PEFT without privacy, on the factors of the phase, or on both with ``both``."""
    model, _, active = copied(cell, both=both)
    return Variant(model, active, _summed(cell, model, active), cell.examples, private=False)


def _product(weight: Tensor, g: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return scale · gᵀ x, computed in the memory order of the private kernels."""
    left, right = (x, g) if weight.shape[0] > weight.shape[1] else (g, x)
    rows, columns = left.flatten(0, -2).T, right.flatten(0, -2)
    total = weight.new_empty(rows.shape[0], columns.shape[1])
    total.addmm_(rows.to(total), columns.to(total), beta=0, alpha=scale)
    return total.T if left is x else total


def nonprivate(cell: Cell, kernel: str) -> Variant:
    """This package's kernels with the ordinary summed gradient, without privacy."""
    model, parameters, active = copied(cell)

    def record(name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        weight = active[name]
        bias = x is None
        grad = g.flatten(0, -2).sum(0) if bias else _product(weight, g, x.detach(), scale)
        grad = grad.to(weight.dtype)  # a bias is summed in autocast's dtype
        weight.grad = grad if weight.grad is None else weight.grad + grad

    attach_kernels(model, parameters, kernel, record)
    return Variant(model, active, _summed(cell, model, active), cell.examples, private=False)


def engine(cell: Cell, kernel: str, *, flat: bool | None = None) -> Variant:
    """This package's private step."""
    model, parameters, active = copied(cell)
    keeper = KernelEngine(model, parameters, kernel, flat=flat)
    keeper.activate(frozenset(active))

    def sums() -> Sums:
        grads = keeper.gradients(lambda: cell.losses(model), cell.examples)
        return clipped_sum(grads, cell.clip_norm)

    return Variant(model, active, sums, cell.examples, private=True)


def peft_compiled(cell: Cell) -> Variant:
    """Stock PEFT with torch.compile, without privacy."""
    model, _, active = copied(cell)
    forward = torch.compile(model, fullgraph=True)
    return Variant(model, active, _summed(cell, forward, active), cell.examples, private=False)


def compiled(cell: Cell) -> Variant:
    """This package's private step with torch.compile."""
    model, parameters, active = copied(cell)
    keeper = CompiledEngine(model, parameters)
    keeper.activate(frozenset(active))
    forward = keeper.prepare_forward(lambda batch: cell.losses(model, batch))

    def sums() -> Sums:
        grads = keeper.gradients(lambda: forward(cell.batch), cell.examples)
        return clipped_sum(grads, cell.clip_norm)

    return Variant(model, active, sums, cell.examples, private=True)


def _clipped(cell: Cell, grads: Mapping[str, Tensor]) -> Sums:
    """Return the clipped sum of (examples, ...) gradients, tensor by tensor as in Opacus."""
    norms = torch.stack([grad.flatten(1).norm(2, dim=1) for grad in grads.values()], dim=1)
    scales = (cell.clip_norm * CLIP_MARGIN / norms.norm(2, dim=1)).clamp(max=1.0)
    return {name: torch.einsum("i,i...", scales, grad) for name, grad in grads.items()}


def _train_mode(model: nn.Module) -> None:
    """Opacus' hooks skip layers in eval mode; a Linear layer computes the same in both."""
    for module in model.modules():
        own = module.parameters(recurse=False)
        if isinstance(module, nn.Linear) and any(p.requires_grad for p in own):
            module.train()


def opacus_hooks(cell: Cell) -> Variant:
    """Opacus' per-sample gradients, with the phase's factors trainable before wrapping."""
    from opacus.grad_sample import GradSampleModule

    model, _, active = copied(cell)
    _train_mode(model)
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)

    def sums() -> Sums:
        torch.autograd.backward(cell.losses(wrapped).sum())
        clipped = _clipped(cell, {name: p.grad_sample for name, p in active.items()})
        for parameter in active.values():
            parameter.grad_sample = None
        return clipped

    return Variant(model, active, sums, cell.examples, private=True)


def opacus_ghost(cell: Cell) -> Variant:
    """Opacus' ghost clipping: one backward for the norms, a second for the reweighted loss."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, _, active = copied(cell)
    _train_mode(model)
    wrapped = GradSampleModuleFastGradientClipping(
        model,
        batch_first=True,
        loss_reduction="sum",
        strict=False,
        max_grad_norm=cell.clip_norm * CLIP_MARGIN,
        use_ghost_clipping=True,
    )

    def sums() -> Sums:
        losses = cell.losses(wrapped)
        torch.autograd.backward(losses.sum(), retain_graph=True)
        for parameter in active.values():
            parameter.grad = None
        scales = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        torch.autograd.backward((scales * losses).sum())
        wrapped.enable_hooks()
        return {name: parameter.grad for name, parameter in active.items()}

    return Variant(model, active, sums, cell.examples, private=True)


def vmap(cell: Cell) -> Variant:
    """torch.func: the gradient of one example's loss, vectorised over the examples."""
    model, _, active = copied(cell)
    names = {wire_name(name): name for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: Mapping[str, Tensor], example: Batch) -> Tensor:
        replaced = {names[name]: value for name, value in values.items()}
        single = {key: value[None] for key, value in example.items()}
        return cell.losses(
            lambda *args, **kwargs: torch.func.functional_call(model, replaced, args, kwargs),
            single,
        )[0]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def sums() -> Sums:
        values = {name: parameter.detach() for name, parameter in active.items()}
        return _clipped(cell, each(values, cell.batch))

    return Variant(model, active, sums, cell.examples, private=True)


VARIANTS: dict[str, Callable[[Cell], Variant]] = {
    "peft": peft,
    "peft-both": lambda cell: peft(cell, both=True),
    "fused-nonprivate": lambda cell: nonprivate(cell, "fused"),
    "fused": lambda cell: engine(cell, "fused"),
    "merged": lambda cell: engine(cell, "merged"),
    "plain": lambda cell: engine(cell, "plain"),
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": opacus_ghost,
    "vmap": vmap,
    "peft-compiled": peft_compiled,
    "compiled": compiled,
    "peft-graph": lambda cell: in_cuda_graph(peft(cell)),
    "fused-graph": lambda cell: in_cuda_graph(engine(cell, "fused")),
}
COMPILED = frozenset({"peft-compiled", "compiled"})  # compiling takes a minute or more per cell
GRAPHS = frozenset({"peft-graph", "fused-graph"})  # on a GPU only
NOT_PRIVATE = frozenset({"peft", "peft-both", "fused-nonprivate", "peft-compiled", "peft-graph"})
PRIVATE = VARIANTS.keys() - NOT_PRIVATE


def median_norm(cell: Cell) -> float:
    """Return the median gradient norm of the examples, so that half of them are clipped."""
    model, parameters, active = copied(cell)
    keeper = KernelEngine(model, parameters, "plain")
    keeper.activate(frozenset(active))
    norms = keeper.gradients(lambda: cell.losses(model), cell.examples).norms()
    return float(norms.median())
