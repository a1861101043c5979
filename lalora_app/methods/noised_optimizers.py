"""Two optimisers for noised gradients, as classes of PyTorch.

A tensor without a gradient keeps its value and its optimiser state bit for bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lalora_app.methods.optimizers import ParameterGroup


def _parameters_with_gradients(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[Tensor, Tensor, ParameterGroup]]:
    """Yield (parameter, gradient, group) of every parameter that has a gradient."""
    for group in optimizer.param_groups:
        held = (p for p in group["params"] if p.grad is not None)
        yield from ((p, p.grad, group) for p in held)


class LowPassSGD(torch.optim.Optimizer):
    """DOPPLER: SGD on noised gradients behind a first-order low-pass filter (arXiv:2408.13460).

    ``m_t = a·m_{t−1} + (1−a)/2·(g_t + g_{t−1})``, with m and g zero before the first step. The
    step is m_t / c_t, where c_t is the same recursion with every g_t = 1 (bias correction). The
    filter multiplies the variance of white noise by (1−a)/2.
    Limit: a = 0 averages two successive gradients.

    Privacy: a linear map of noised gradients; no extra cost.
    """

    COEFFICIENT = 0.9

    def __init__(self, groups: list[ParameterGroup], weight_decay: float = 0.0):
        super().__init__(groups, {"lr": 1.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step on every tensor that has a gradient."""
        for parameter, grad, group in _parameters_with_gradients(self):
            self._step(parameter, grad, group["lr"], group["weight_decay"])

    def _step(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state, a = self.state[parameter], self.COEFFICIENT
        if not state:
            zero = torch.zeros_like(parameter)
            state.update(low=zero, last=zero.clone(), one=0.0, last_one=0.0)
        half = (1 - a) / 2
        state["low"].mul_(a).add_(grad + state["last"], alpha=half)
        state["one"] = a * state["one"] + half * (1.0 + state["last_one"])
        state["last"], state["last_one"] = grad.clone(), 1.0
        parameter.mul_(1 - lr * weight_decay).add_(state["low"], alpha=-lr / state["one"])


class UnbiasedAdamW(torch.optim.Optimizer):
    """DP-FedAdamW's local step: AdamW with the noise subtracted from v̂ (arXiv:2602.19945).

    The second moment ``v̂`` exceeds the square of the signal by the noise variance s². The step
    divides by ``sqrt(max(v̂ − s², 0)) + ε`` with ε = s, because the remainder of v̂ may be random.
    Not implemented: the paper's block means of v on the server, and its term for the global update.
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

    def _step(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state, (one, two) = self.state[parameter], self.BETAS
        if not state:
            state.update(m=torch.zeros_like(grad), v=torch.zeros_like(grad), steps=0)
        state["steps"] += 1
        state["m"].lerp_(grad, 1 - one)
        state["v"].mul_(two).addcmul_(grad, grad, value=1 - two)
        mean = state["m"] / (1 - one ** state["steps"])
        square = state["v"] / (1 - two ** state["steps"]) - self.noise_std**2
        size = square.clamp(min=0).sqrt_().add_(max(self.noise_std, 1e-8))
        parameter.mul_(1 - lr * weight_decay).addcdiv_(mean, size, value=-lr)
