"""One training step on one batch, measured as one variant among others."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from models import Batch, Row
from torch import Tensor, nn

from lalora_app.adapter.factors import active_names
from lalora_app.blocks.adapters import wire_name
from lalora_app.privacy.randomness import secure
from lalora_app.private_step.mechanism import add_noise

PHASES = {"A": frozenset("A"), "B": frozenset("B"), "both": frozenset("AB")}
LEARNING_RATE, NOISE_STD = 1e-9, 1e-3  # keeps the weights unchanged at equal work
Parameters = dict[str, nn.Parameter]  # by wire name
Sums = Mapping[str, Tensor]  # wire name -> gradient sum of the step, before noise


@dataclass(frozen=True)
class Cell:
    """The settings that all variants of one comparison share."""

    row: Row
    phase: str
    batch: Batch
    clip_norm: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def examples(self) -> int:
        """Return the number of examples."""
        return len(self.batch["labels"])

    @property
    def device(self) -> torch.device:
        """Return the device of the batch."""
        return self.batch["labels"].device

    def losses(self, model: Callable[..., object], batch: Batch | None = None) -> Tensor:
        """Return (examples,): one loss per example, under autocast if the cell says so."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            return self.row.losses(model, self.batch if batch is None else batch)


@dataclass
class Variant:
    """One variant of a step.

    Attributes:
        model: the model, which no other variant shares.
        active: the trained tensors by wire name.
        sums: returns their gradient sums; clipped in a private variant.
        examples: the number of examples of the batch.
        private: whether a step adds noise.
    """

    model: nn.Module
    active: Parameters
    sums: Callable[[], Sums]
    examples: int
    private: bool

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.SGD(self.active.values(), lr=LEARNING_RATE, foreach=True)
        self._rng = secure()

    def step(self) -> None:
        """Compute the sums, add noise if the step is private, and update the tensors."""
        self._optimizer.zero_grad(set_to_none=True)
        grads = self.sums()
        if self.private:
            expected = float(self.examples)
            grads = add_noise(grads, noise_std=NOISE_STD, expected_batch=expected, rng=self._rng)
        for name, grad in grads.items():
            self.active[name].grad = grad
        self._optimizer.step()


def _trained(model: nn.Module) -> Parameters:
    return {wire_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def copied(cell: Cell, *, both: bool = False) -> tuple[nn.Module, Parameters, Parameters]:
    """Return a copy of the model, its adapter, and the active tensors, made trainable."""
    model = copy.deepcopy(cell.row.model)
    parameters = _trained(model)
    factors = PHASES["both" if both else cell.phase]
    names = active_names(parameters, factors)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    return model, parameters, {name: parameters[name] for name in parameters if name in names}


def in_cuda_graph(variant: Variant) -> Variant:
    """Let a variant replay its sums as one CUDA graph; noise and update are as before."""
    sums, side, graph = variant.sums, torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch's recipe: a few calls on another stream before
        for _ in range(3):
            sums()
    torch.cuda.current_stream().wait_stream(side)
    for parameter in variant.active.values():
        parameter.grad = None  # the graph's own gradients are then overwritten, not added to
    with torch.cuda.graph(graph):
        found = sums()

    def replay() -> Sums:
        graph.replay()
        return found

    return replace(variant, sums=replay)
