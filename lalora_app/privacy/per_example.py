"""Per-example gradients of the trainable Linear layers, in one forward and one backward.

Each trainable ``nn.Linear`` (LoRA factors and head) computes through an autograd function whose
backward stores one gradient an example, by one batched product, and no summed gradient. For a
LoRA factor this costs as many FLOPs as the ordinary gradient. Leading dimensions are regrouped
to (examples, rows, features), so window attention, whose layers see batch·windows rows, is
clipped by the image and not by the window (trap L).
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lalora_app.privacy.types import PerExampleGrads


class LayoutError(ValueError):
    """The model's layout does not allow per-example gradients."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, record: Any) -> Tensor:
        ctx.record = record
        needs_x = weight.requires_grad
        ctx.save_for_backward(x if needs_x else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight = ctx.saved_tensors
        ctx.record(x, g)
        grad_x = g @ weight.to(g.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


def _linear_layers(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, nn.Linear]:
    wanted = {id(parameter): name for name, parameter in names.items()}
    owners: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in wanted]
        if not own:
            continue
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise LayoutError(f"{path} trains but is a {type(module).__name__}, not a plain Linear")
        if shared := owners.keys() & {wanted[id(p)] for p in own}:
            raise LayoutError(f"{path} shares {min(shared)} with another layer")
        owners |= {wanted[id(p)]: module for p in own}
    return owners


class PerExampleEngine:
    """Book-keeper of per-example gradients over named parameters of Linear layers.

    Args:
        model: the model; the forward of the layers concerned is replaced in place.
        parameters: wire name -> parameter, each of a Linear layer (weight or bias).

    Raises:
        LayoutError: if a parameter belongs to another kind of layer.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self._examples = 0
        self._grads: dict[str, Tensor] = {}
        owners = _linear_layers(model, parameters)
        for layer in {id(layer): layer for layer in owners.values()}.values():
            keys = {id(parameters[n]): n for n, owner in owners.items() if owner is layer}
            self._take_over(layer, keys.get(id(layer.weight)), keys.get(id(layer.bias)))

    def _take_over(self, layer: nn.Linear, weight: str | None, bias: str | None) -> None:
        def record(x: Tensor | None, g: Tensor) -> None:
            if bias is not None and layer.bias.requires_grad:
                self._add(bias, self._regrouped(g).sum(1))
            if weight is not None and x is not None:
                rows = self._regrouped(g)  # (examples, rows, out)
                self._add(weight, torch.bmm(rows.transpose(1, 2), self._regrouped(x)))

        def forward(layer: nn.Linear, x: Tensor) -> Tensor:
            return _Linear.apply(x, layer.weight, layer.bias, record)  # type: ignore[no-any-return]

        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]

    def _regrouped(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] % self._examples:
            raise LayoutError(f"{rows.shape[0]} rows do not divide into {self._examples} examples")
        # Sums over rows run in fp32 at least, also under bf16 autocast.
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return wide.reshape(self._examples, -1, x.shape[-1])

    def _add(self, name: str, grad: Tensor) -> None:
        seen = self._grads.get(name)  # a layer called twice: its gradients add up
        self._grads[name] = grad if seen is None else seen + grad

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly ``names`` trainable, so that autograd keeps no activation for the rest."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient an example of the active parameters.

        Args:
            losses: runs the forward and returns (examples,): each example's own loss.
            examples: the batch size; every layer's rows are grouped by example, in this order.

        Raises:
            LayoutError: if an active parameter took no part, or shapes do not fit the examples.
        """
        self._grads, self._examples = {}, examples
        each = losses()
        if each.shape != (examples,):
            raise LayoutError(f"losses are of shape {tuple(each.shape)}, and must be ({examples},)")
        torch.autograd.backward(each.sum())
        active = [name for name, p in self.parameters.items() if p.requires_grad]
        for name in active:
            if name not in self._grads:
                raise LayoutError(f"{name} is active but took no part in the forward pass")
        taken, self._grads = {name: self._grads[name] for name in active}, {}
        return PerExampleGrads(taken)


Losses = Callable[[list[int]], Tensor]


def check_layout(engine: PerExampleEngine, losses: Losses, examples: int) -> None:
    """Prove that rows are grouped by example and that no layer mixes examples (traps K, L).

    The loss of one example of a batch is differentiated: every other example's row must be exactly
    0 in every parameter. And an example's loss must stay the same when another one is left out,
    which also sees what is mixed below the trained layers. Factors at 0 hide their partner's
    gradient, so they are filled with random numbers for the check and restored. Run it on public
    or random inputs only.

    Args:
        engine: with all parameters of interest made active here, and left so.
        losses: indices of fixed inputs -> (indices,): the forward on just these.
        examples: how many inputs there are, at least 3.

    Raises:
        LayoutError: names the first parameter that sees another example.
    """
    rows = list(range(examples))
    engine.activate(frozenset(engine.parameters))
    kept = {name: p.detach().clone() for name, p in engine.parameters.items()}
    try:
        for parameter in engine.parameters.values():
            nn.init.normal_(parameter, std=0.1)
        for example in range(examples):
            grads = engine.gradients(partial(_one_loss, losses, rows, example), examples)
            _only_row(grads, example)
        _same_with_fewer(losses, rows)
    finally:
        with torch.no_grad():
            for name, parameter in engine.parameters.items():
                parameter.copy_(kept[name])


def _one_loss(losses: Losses, rows: list[int], example: int) -> Tensor:
    chosen = torch.arange(len(rows)) == example
    each = losses(rows)
    return torch.where(chosen.to(each.device), each, torch.zeros_like(each))


@torch.no_grad()
def _same_with_fewer(losses: Losses, rows: list[int]) -> None:
    together = losses(rows)
    tolerance = 1e-2 if together.dtype == torch.bfloat16 else 1e-3  # rounding moves far less
    for fewer in (rows[1:], rows[:-1]):
        same = torch.allclose(losses(fewer), together[fewer], rtol=tolerance, atol=tolerance)
        if not same:
            raise LayoutError(
                "an example's loss depends on the others in its batch: a layer mixes examples, "
                "such as BatchNorm"
            )


def _only_row(grads: PerExampleGrads, example: int) -> None:
    for name, grad in grads.items():
        norms = grad.flatten(1).norm(dim=1)  # (examples,)
        others = torch.cat([norms[:example], norms[example + 1 :]])
        if bool((others != 0).any()) or not bool(norms[example] > 0):
            raise LayoutError(
                f"{name}: the gradient of one example touches another's rows (rows not grouped by "
                "example, or a layer that mixes examples, such as BatchNorm)"
            )
