"""Other parameters than the factors themselves: gates, magnitudes, projections.

A method may train θ, with the factors that the model computes with a function of θ. The gradient
of one example's loss in θ is Jᵀ times its gradient in the factors, J the same for all examples:
exact, and still one gradient an example, so clip and noise go on as ever.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lalora_app.private_step.engine import Engine, set_trainable
from lalora_app.private_step.gradients import FlatBlock, PerExampleGrads, StoredShape

Tensors = dict[str, Tensor]
Reparametrisation = Callable[[Tensors], Tensors]  # θ -> the model's own tensors; differentiable


class ReparametrisedEngine:
    """An engine whose parameters are θ.

    Args:
        engine: of the model's own tensors.
        theta: the values of θ, by name.
        effective: θ -> all of the engine's tensors.
    """

    def __init__(self, engine: Engine, theta: Mapping[str, Tensor], effective: Reparametrisation):
        self._parameters = {name: nn.Parameter(value.clone()) for name, value in theta.items()}
        self._engine, self._effective = engine, effective

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the tensors of θ by name."""
        return self._parameters

    def activate(self, names: frozenset[str]) -> None:
        """Make exactly the named tensors of θ trainable."""
        set_trainable(self.parameters, names)

    def prepare_forward(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the forward function that the model's own engine prepares."""
        return self._engine.prepare_forward(forward)

    def write_to_model(self) -> None:
        """Make the model compute with the present θ."""
        with torch.no_grad():
            for name, value in self._effective(dict(self.parameters)).items():
                self._engine.parameters[name].copy_(value)

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient an example of the active θ, see :class:`Engine`."""
        self.write_to_model()
        self._engine.activate(frozenset(self._engine.parameters))
        grads = self._engine.gradients(losses, examples).dense()
        active = {n: p.detach() for n, p in self.parameters.items() if p.requires_grad}
        resting = {n: p.detach() for n, p in self.parameters.items() if n not in active}

        def own(theta: Tensors) -> Tensors:
            tensors = self._effective(resting | theta)
            return {name: tensors[name] for name in grads}  # vjp wants the order of ``grads``

        pull = torch.func.vjp(own, active)[1]
        (pulled,) = torch.vmap(pull)(grads)
        return PerExampleGrads(
            tuple(
                FlatBlock({name: StoredShape(tuple(grad.shape[1:]))}, grad.flatten(1))
                for name, grad in pulled.items()
            )
        )
