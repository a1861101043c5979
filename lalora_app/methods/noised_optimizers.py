"""Three optimisers for noised gradients, as classes of PyTorch.

A tensor without a gradient keeps its value and its optimiser state bit for bit.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.parametrisations import change_name, moment_name
from lalora_app.methods.optimizers import OptimizerSettings, ParameterGroup


def _parameters_with_gradients(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[Tensor, Tensor, ParameterGroup]]:
    """Yield (parameter, gradient, group) of every parameter that has a gradient."""
    for group in optimizer.param_groups:
        held = (p for p in group["params"] if p.grad is not None)
        yield from ((p, p.grad, group) for p in held)


class LowPassSGD(torch.optim.Optimizer):
    """DOPPLER: SGD on noised gradients behind a low-pass filter (arXiv:2408.13460).

    ``m_t = a·m_{t−1} + (1−a)/2·(g_t + g_{t−1})``, with m and g zero before the first step. The
    step is m_t / c_t, where c_t is the same recursion with every g_t = 1 (bias correction). A
    filter of order n is this filter n times one after another: all poles are a, all zeros −1. The
    first order multiplies the variance of white noise by (1−a)/2.
    Limit: a = 0 averages two successive gradients, n times.

    Privacy: a linear map of noised gradients; no extra cost.
    """

    COEFFICIENT = 0.9

    def __init__(self, groups: list[ParameterGroup], weight_decay: float = 0.0, order: int = 1):
        self.order = order
        super().__init__(groups, {"lr": 1.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step on every tensor that has a gradient."""
        for parameter, grad, group in _parameters_with_gradients(self):
            self._step(parameter, grad, group["lr"], group["weight_decay"])

    def _step(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        filtered, one = grad, 1.0
        for stage in range(self.order):
            filtered, one = self._low(self.state[parameter], f" {stage}", filtered, one)
        parameter.mul_(1 - lr * weight_decay).add_(filtered, alpha=-lr / one)

    def _low(
        self, state: dict[str, Any], stage: str, grad: Tensor, one: float
    ) -> tuple[Tensor, float]:
        """Return m_t of a gradient and c_t of the number in its place, by one first-order filter.

        Args:
            state: the parameter's state, which the step changes.
            stage: the end of the filter's keys in the state.
            grad: g_t, the gradient or the output of the filter before.
            one: 1, or the output of the filter before for 1.
        """
        low, last, ones = "low" + stage, "last" + stage, "ones" + stage
        if low not in state:
            state.update({low: torch.zeros_like(grad), last: torch.zeros_like(grad)})
            state[ones] = 0.0, 0.0  # the last output and the last input
        a, half = self.COEFFICIENT, (1 - self.COEFFICIENT) / 2
        state[low].mul_(a).add_(grad + state[last], alpha=half)
        state[last] = grad.clone()
        state[ones] = a * state[ones][0] + half * (one + state[ones][1]), one
        return state[low], state[ones][0]


class UnbiasedAdamW(torch.optim.Optimizer):
    """DP-FedAdamW's local step: AdamW with the noise subtracted from v̂ (arXiv:2602.19945).

    The second moment ``v̂`` exceeds the square of the signal by the noise variance s². The step
    divides by ``sqrt(max(v̂ − s², 0)) + ε`` with ε = s, because the remainder of v̂ may be random.
    :class:`GuidedAdamW` has the paper's parts that need the server.
    Limit: s = 0 is AdamW with ε = 1e-8.

    Privacy: s is a public constant of the run; no extra cost.
    """

    BETAS = (0.9, 0.999)

    def __init__(self, groups: list[ParameterGroup], noise_std: float, weight_decay: float = 0.0):
        self.noise_std = noise_std
        super().__init__(groups, {"lr": 1e-3, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step on every tensor that has a gradient."""
        for parameter, grad, group in _parameters_with_gradients(self):
            self._step(parameter, grad, group["lr"], group["weight_decay"])

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state before the first step; ``missing`` is the share of v that is unknown."""
        zero = torch.zeros_like(parameter)
        return dict(m=zero, v=zero.clone(), steps=0, missing=1.0)

    def _square(self, state: dict[str, Any]) -> Tensor:
        """Return v̂, the second moment without the bias of its unknown start."""
        square: Tensor = state["v"] / (1 - state["missing"] * self.BETAS[1] ** state["steps"])
        return square

    def _step(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state, (one, two) = self.state[parameter], self.BETAS
        if not state:
            state.update(self._start(parameter))
        state["steps"] += 1
        state["m"].lerp_(grad, 1 - one)
        state["v"].mul_(two).addcmul_(grad, grad, value=1 - two)
        mean = state["m"] / (1 - one ** state["steps"])
        square = self._square(state) - self.noise_std**2
        size = square.clamp(min=0).sqrt_().add_(max(self.noise_std, 1e-8))
        parameter.mul_(1 - lr * weight_decay).addcdiv_(mean, size, value=-lr)


class GuidedAdamW(UnbiasedAdamW):
    """DP-FedAdamW with the server's means of v and its last global change (arXiv:2602.19945).

    v of a tensor starts from v̄ + s², where v̄ is the mean over clients and entries of v̂ − s², with
    each client's own noise variance s²: clients of different sizes have different noise. Each step
    adds (γ·η/K)·Δ_G, where Δ_G is the last change of the global tensor, γ is ``rule.global-pull``,
    η the learning rate and K ``train.local-steps``. The paper averages v̂ itself, and divides v by
    1 − β₂ᵏ whatever its start, which would multiply v̄ by about 1000 in the first step; here only a
    start at zero is corrected.
    Limit: v̄ = 0 and Δ_G = 0, as before round 1, is :class:`UnbiasedAdamW`.

    Args:
        groups: parameter groups with the ``names`` of their tensors.
        settings: the settings of the run and the tensors that the client has received.

    Privacy: v is made of noised gradients, v̄ and Δ_G of noised uploads; no extra cost.
    """

    def __init__(self, groups: list[ParameterGroup], settings: OptimizerSettings):
        super().__init__(groups, settings.noise_std, settings.train.weight_decay)
        self._pull = settings.rule.global_pull / settings.train.local_steps
        self._received = settings.received
        pairs = (zip(g["names"], g["params"], strict=True) for g in groups)
        self._names = {parameter: name for pair in pairs for name, parameter in pair}
        self._changes = {
            p: torch.from_numpy(self._received[change_name(name)]).to(p)
            for p, name in self._names.items()
        }

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        mean = float(self._received[moment_name(self._names[parameter])][0])
        if mean <= 0:  # before the first round, or the upload of a client that lies
            return super()._start(parameter)
        v = torch.full_like(parameter, mean + self.noise_std**2)
        return super()._start(parameter) | {"v": v, "missing": 0.0}

    def _step(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        super()._step(parameter, grad, lr, weight_decay)
        parameter.add_(self._changes[parameter], alpha=self._pull * lr)

    def block_means(self) -> Adapter:
        """Return (1,) for every trained tensor: the mean of v̂ − s² over its entries, at least 0.

        Privacy: a function of noised gradients; no extra cost.
        """
        means = {
            name: self._square(self.state[p]).mean().item() - self.noise_std**2
            for p, name in self._names.items()
            if self.state[p]
        }
        return {moment_name(n): np.full(1, max(mean, 0), np.float32) for n, mean in means.items()}
