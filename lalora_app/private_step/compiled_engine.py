"""Per-example gradients under torch.compile, by expanded weights.

Every active weight is expanded to one view per example, (examples, *shape), without extra memory.
Autograd differentiates the losses by these views. This uses ordinary operations only, so
torch.compile can compile forward and backward pass completely. Gradients of all layers are formed,
also of heads with one position per example.
"""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lalora_app.private_step.attach import linear_layers, replace_forward, require_grouped
from lalora_app.private_step.engine import check_losses, set_trainable
from lalora_app.private_step.gradients import FlatBlock, PerExampleGrads, StoredShape
from lalora_app.private_step.tape import unused_parameter_error

Names = tuple[str | None, str | None]


def _expanded_linear(leaves: dict[str, Tensor], names: Names) -> Callable[[Any, Tensor], Tensor]:
    """Return the forward function of a Linear layer with expanded weight and bias.

    Args:
        leaves: wire name -> expanded parameter, filled before the forward pass; the layer's own
            parameter is used for a missing name.
        names: wire names of weight and bias; None for a parameter that never trains.
    """
    weight_name, bias_name = names

    def forward(layer: Any, x: Tensor) -> Tensor:
        weight, bias = leaves.get(weight_name or ""), leaves.get(bias_name or "")
        if weight is None and bias is None:
            return F.linear(x, layer.weight, layer.bias)
        examples = (bias if weight is None else weight).shape[0]  # type: ignore[union-attr]
        require_grouped(weight_name or "", x, examples)
        rows = x.reshape(examples, -1, x.shape[-1])
        y = rows @ (layer.weight.mT if weight is None else weight.mT)  # (examples, rows, out)
        if layer.bias is not None:
            y = y + (layer.bias if bias is None else bias[:, None])
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return forward


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a copy of a function that shares no code object with it.

    torch.compile compiles a code object at most eight times in a process. The copies of a nested
    function share one code object, so models of several LoRA ranks would share this limit.
    """
    assert isinstance(function, FunctionType)
    code, name = function.__code__.replace(), function.__name__
    return FunctionType(code, function.__globals__, name, None, function.__closure__)


class CompiledEngine:
    """Computes per-example gradients by torch.compile, for ``lora.kernel="compiled"``.

    The gradients equal those of the other engines up to rounding errors.

    Args:
        model: the model; the forward function of its trainable layers is replaced in place.
        parameters: wire name -> trainable parameter, each the weight or bias of a Linear layer.

    Raises:
        LayoutError: if a parameter belongs to another type of layer.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self._parameters = dict(parameters)
        self._leaves: dict[str, Tensor] = {}
        names = {id(p): name for name, p in parameters.items()}
        owners = linear_layers(model, parameters)
        for layer in {id(layer): layer for layer in owners.values()}.values():
            keys = (names.get(id(layer.weight)), names.get(id(layer.bias)))
            replace_forward(layer, _expanded_linear(self._leaves, keys))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors of the model, by wire name."""
        return self._parameters

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly the named tensors trainable; only these are expanded."""
        set_trainable(self.parameters, names)

    def write_to_model(self) -> None:
        """Do nothing: the engine's parameters are the model's parameters."""

    def prepare_forward(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the compiled forward function; its backward pass is compiled too.

        The expanded parameters are arguments of the compiled function. The compiler would treat
        the size of a tensor that it reads from a module as constant, and would compile again for
        every batch size.
        """

        def with_leaves(leaves: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            self._leaves.update(leaves)
            return forward(*inputs)

        whole = torch.compile(_with_own_code(with_leaves), fullgraph=True, dynamic=True)

        def compiled(*inputs: Tensor) -> Tensor:
            leaves = dict(self._leaves)
            self._leaves.clear()
            return whole(leaves, *inputs)

        return compiled

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient per example for every active tensor, see :class:`Engine`."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                leaf = parameter.detach().expand(examples, *parameter.shape)
                self._leaves[name] = leaf.requires_grad_()
        try:
            example_losses = losses()
            check_losses(example_losses, examples)
            grads = torch.autograd.grad(
                example_losses.sum(), list(self._leaves.values()), allow_unused=True
            )
            return PerExampleGrads(tuple(map(_block, self._leaves, grads)))
        finally:
            self._leaves.clear()


def _block(name: str, grad: Tensor | None) -> FlatBlock:
    if grad is None:
        raise unused_parameter_error(name)
    return FlatBlock({name: StoredShape(tuple(grad.shape[1:]))}, grad.flatten(1))
