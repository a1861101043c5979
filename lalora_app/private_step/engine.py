"""Per-example gradients of trainable Linear layers, in one forward and one backward pass.

`Engine` is the interface, `KernelEngine` the usual implementation. The backward of every trainable
layer records its output gradient g and its input x, and computes no summed weight gradient. One
batched product g xᵀ then gives one gradient per example. For a LoRA factor this costs as many
FLOPs as the ordinary gradient.

Rows are regrouped to (examples, rows, features). In window attention a layer sees batch·windows
rows; the regrouping makes sure that an image is clipped as a whole, not per window. Rows that
belong to no example are never divided among the examples: their first axis is refused, or
``shared_rows.py`` has expanded them to one set per example.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lalora_app.private_step.attach import LayoutError, attach_kernels
from lalora_app.private_step.gradients import PerExampleGrads
from lalora_app.private_step.tape import BufferLayout, GradientTape, stored_shape_of


def check_losses(example_losses: Tensor, examples: int) -> None:
    """Check that there is one loss per example.

    Raises:
        LayoutError: if the shape of ``example_losses`` is not (examples,).
    """
    if example_losses.shape != (examples,):
        raise LayoutError(
            f"losses are of shape {tuple(example_losses.shape)}, and must be ({examples},)"
        )


def set_trainable(parameters: Mapping[str, nn.Parameter], names: frozenset[str]) -> None:
    """Make exactly the named parameters require gradients."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


class Engine(Protocol):
    """The interface of a source of per-example gradients for one model.

    Implementations: :class:`KernelEngine`, ``CompiledEngine``, ``ReparametrisedEngine``.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by wire name."""

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly the named tensors trainable in the next steps."""

    def write_to_model(self) -> None:
        """Copy the parameters into the model, if they are not the model's own tensors."""

    def prepare_forward(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the forward function for training: ``forward`` itself or a compiled version."""

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient per example for every active tensor.

        Args:
            losses: function without arguments that runs the forward pass and returns (examples,)
                losses.
            examples: number of examples in the batch.

        Raises:
            LayoutError: if an active tensor got no gradient, or a shape does not fit the number of
                examples.

        Privacy: the result is neither clipped nor noised.
        """


class KernelEngine:
    """The engine of ``lora.kernel`` "fused", "merged" and "plain": layers record g and x.

    Args:
        model: the model; the forward function of its trainable layers is replaced in place.
        parameters: wire name -> trainable parameter, each the weight or bias of a Linear layer.
        kernel: ``fused``, ``merged`` or ``plain``.
        flat: whether the gradients of all factors share one (examples, entries) buffer instead of
            one buffer per shape. This needs fewer GPU kernels but slows down products on a CPU;
            None means True on a GPU and False on a CPU.

    Raises:
        LayoutError: if a parameter belongs to another type of layer.
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
        self._stored_shapes = {
            name: stored_shape_of(shape, flat=self._flat) for name, shape in shapes.items()
        }
        self._layouts: dict[tuple[str, ...], BufferLayout] = {}
        self._tape = GradientTape(0, BufferLayout({}, False))
        attach_kernels(model, parameters, kernel, self._record)

    def _record(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        self._tape.record(name, g, x, scale)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors of the model, by wire name."""
        return self._parameters

    def write_to_model(self) -> None:
        """Do nothing: the engine's parameters are the model's parameters."""

    def prepare_forward(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return ``forward`` unchanged."""
        return forward

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly the named tensors trainable; autograd keeps no activation for the others."""
        set_trainable(self.parameters, names)

    def _layout(self) -> BufferLayout:
        active = tuple(name for name, p in self.parameters.items() if p.requires_grad)
        if active not in self._layouts:
            stored_shapes = {name: self._stored_shapes[name] for name in active}
            self._layouts[active] = BufferLayout(stored_shapes, self._flat)
        return self._layouts[active]

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient per example for every active tensor, see :class:`Engine`.

        The rows of every layer must be grouped by example, in the order of the losses.
        """
        self._tape = GradientTape(examples, self._layout())
        example_losses = losses()
        check_losses(example_losses, examples)
        torch.autograd.backward(example_losses.sum())
        tape, self._tape = self._tape, GradientTape(0, BufferLayout({}, False))
        return tape.grads()
