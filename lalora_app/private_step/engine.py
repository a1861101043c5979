"""Per-example gradients of the trainable Linear layers, in one forward and one backward pass.

Each trainable layer computes through a kernel whose backward records what its weight gradient is
made of, and no summed gradient. One batched product turns that into one gradient an example; for
a LoRA factor it costs as many FLOPs as the ordinary gradient. Leading dimensions are regrouped to
(examples, rows, features), so window attention, whose layers see batch·windows rows, is clipped
by the image and not by the window (trap L).
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lalora_app.private_step.attach import LayoutError, attach_kernels
from lalora_app.private_step.gradients import PerExampleGrads
from lalora_app.private_step.tape import BufferLayout, GradientTape, stored_shape_of


def check_losses(each: Tensor, examples: int) -> None:
    """Refuse losses that are not one number an example.

    Raises:
        LayoutError: with the shape found.
    """
    if each.shape != (examples,):
        raise LayoutError(f"losses are of shape {tuple(each.shape)}, and must be ({examples},)")


def set_trainable(parameters: Mapping[str, nn.Parameter], names: frozenset[str]) -> None:
    """Make exactly the named parameters require gradients."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


class Engine(Protocol):
    """A source of per-example gradients for the trainable tensors of one model.

    Implementations: :class:`KernelEngine`, ``CompiledEngine``, ``ReparametrisedEngine``.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by wire name."""

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly the named tensors trainable in the next steps."""

    def write_to_model(self) -> None:
        """Copy the present parameters into the model, if the model does not hold them itself."""

    def prepare_forward(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the forward function to use in training: ``forward`` itself, or compiled."""

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient per example for every active tensor.

        Args:
            losses: function without arguments; runs the forward pass, returns (examples,) losses.
            examples: number of examples in the batch.

        Raises:
            LayoutError: if an active tensor took no part, or a shape does not fit the examples.
        """


class KernelEngine:
    """The engine of ``lora.kernel`` "fused", "merged" and "plain": layers record their factors.

    Args:
        model: the model; the forward of the layers concerned is replaced in place.
        parameters: wire name -> parameter, each of a Linear layer (weight or bias).
        kernel: ``fused``, ``merged`` or ``plain``.
        flat: keep the factors' gradients in one (examples, entries) buffer instead of one a
            shape: fewer kernels on a GPU, where it is the default; slower products on a CPU.

    Raises:
        LayoutError: if a parameter belongs to another kind of layer.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        kernel: str = "fused",
        *,
        flat: bool | None = None,
    ):
        self._parameters = dict(parameters)
        on_gpu = any(p.device.type != "cpu" for p in parameters.values())
        self._flat = on_gpu if flat is None else flat
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._slots = {
            name: stored_shape_of(shape, flat=self._flat) for name, shape in shapes.items()
        }
        self._layouts: dict[tuple[str, ...], BufferLayout] = {}
        self._tape = GradientTape(0, BufferLayout({}, False))
        attach_kernels(model, parameters, kernel, self._record)

    def _record(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        self._tape.record(name, g, x, scale)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by wire name; they are the model's own."""
        return self._parameters

    def write_to_model(self) -> None:
        """Do nothing: the parameters are the model's own."""

    def prepare_forward(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the forward function as it is."""
        return forward

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly ``names`` trainable, so that autograd keeps no activation for the rest."""
        set_trainable(self.parameters, names)

    def _layout(self) -> BufferLayout:
        active = tuple(name for name, p in self.parameters.items() if p.requires_grad)
        if active not in self._layouts:
            slots = {name: self._slots[name] for name in active}
            self._layouts[active] = BufferLayout(slots, self._flat)
        return self._layouts[active]

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient an example of the active parameters.

        Args:
            losses: runs the forward and returns (examples,): each example's own loss.
            examples: the batch size; every layer's rows are grouped by example, in this order.

        Raises:
            LayoutError: if an active parameter took no part, or shapes do not fit the examples.
        """
        self._tape = GradientTape(examples, self._layout())
        each = losses()
        check_losses(each, examples)
        torch.autograd.backward(each.sum())
        tape, self._tape = self._tape, GradientTape(0, BufferLayout({}, False))
        return tape.grads()
