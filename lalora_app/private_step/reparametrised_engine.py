"""Per-example gradients of a reparametrised model: gates, magnitudes, projections.

A method may train tensors θ, and compute the model's factors as a function of θ. By the chain rule,
the gradient of one example's loss with respect to θ is Jᵀ times its gradient with respect to the
factors. J, the Jacobian of that function, is the same for all examples. The result is exact and has
one gradient per example, so clipping and noise are unchanged.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lalora_app.private_step.engine import Engine, set_trainable
from lalora_app.private_step.gradients import FlatBlock, PerExampleGrads, StoredShape

Tensors = dict[str, Tensor]
Reparametrisation = Callable[[Tensors], Tensors]  # θ -> tensors of the model; differentiable


class ReparametrisedEngine:
    """An engine for the tensors θ of a parametrisation.

    Args:
        engine: the engine of the model's own tensors.
        theta: initial values of θ, by name.
        effective: function from θ to all tensors of ``engine``.
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
        """Return the training forward function of the model's own engine."""
        return self._engine.prepare_forward(forward)

    def write_to_model(self) -> None:
        """Compute the model's tensors from θ and copy them into the model."""
        with torch.no_grad():
            for name, value in self._effective(dict(self.parameters)).items():
                self._engine.parameters[name].copy_(value)

    def gradients(self, losses: Callable[[], Tensor], examples: int) -> PerExampleGrads:
        """Return one gradient per example for every active tensor of θ, see :class:`Engine`."""
        self.write_to_model()
        self._engine.activate(frozenset(self._engine.parameters))
        grads = self._engine.gradients(losses, examples).dense()
        active = {n: p.detach() for n, p in self.parameters.items() if p.requires_grad}
        resting = {n: p.detach() for n, p in self.parameters.items() if n not in active}

        def effective_of_active(theta: Tensors) -> Tensors:
            tensors = self._effective(resting | theta)
            return {name: tensors[name] for name in grads}  # vjp needs the key order of ``grads``

        pullback = torch.func.vjp(effective_of_active, active)[1]
        (pulled,) = torch.vmap(pullback)(grads)
        return PerExampleGrads(
            tuple(
                FlatBlock({name: StoredShape(tuple(grad.shape[1:]))}, grad.flatten(1))
                for name, grad in pulled.items()
            )
        )
