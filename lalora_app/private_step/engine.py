"""Per-example gradients of the trainable Linear layers, in one forward and one backward.

Each trainable layer computes through a kernel whose backward records what its weight gradient is
made of, and no summed gradient. One batched product turns that into one gradient an example; for
a LoRA factor it costs as many FLOPs as the ordinary gradient. Leading dimensions are regrouped to
(examples, rows, features), so window attention, whose layers see batch·windows rows, is clipped
by the image and not by the window (trap L).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lalora_app.private_step.attach import LayoutError, attach
from lalora_app.private_step.gradients import PerExampleGrads
from lalora_app.private_step.tape import Layout, Tape, slot_of


def require_losses(each: Tensor, examples: int) -> None:
    """Refuse losses that are not one number an example.

    Raises:
        LayoutError: with the shape found.
    """
    if each.shape != (examples,):
        raise LayoutError(f"losses are of shape {tuple(each.shape)}, and must be ({examples},)")


class PerExampleEngine:
    """Book-keeper of per-example gradients over named parameters of Linear layers.

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
        self.parameters = dict(parameters)
        on_gpu = any(p.device.type != "cpu" for p in parameters.values())
        self._flat = on_gpu if flat is None else flat
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._slots = {name: slot_of(shape, flat=self._flat) for name, shape in shapes.items()}
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._tape = Tape(0, Layout({}, False))
        attach(model, parameters, kernel, self._record)

    def _record(self, name: str, g: Tensor, x: Tensor | None, scale: float = 1.0) -> None:
        self._tape.record(name, g, x, scale)

    def write(self) -> None:
        """Make the model compute with the present parameters: here they are its own."""

    def prepare(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the forward to train through: here, as it is."""
        return forward

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly ``names`` trainable, so that autograd keeps no activation for the rest."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)

    def _layout(self) -> Layout:
        active = tuple(name for name, p in self.parameters.items() if p.requires_grad)
        if active not in self._layouts:
            slots = {name: self._slots[name] for name in active}
            self._layouts[active] = Layout(slots, self._flat)
        return self._layouts[active]

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient an example of the active parameters.

        Args:
            losses: runs the forward and returns (examples,): each example's own loss.
            examples: the batch size; every layer's rows are grouped by example, in this order.

        Raises:
            LayoutError: if an active parameter took no part, or shapes do not fit the examples.
        """
        self._tape = Tape(examples, self._layout())
        each = losses()
        require_losses(each, examples)
        torch.autograd.backward(each.sum())
        tape, self._tape = self._tape, Tape(0, Layout({}, False))
        return tape.grads()
