"""The optimisers of the table of methods: SGD and AdamW of PyTorch, and three for noised gradients.

All of them read noised gradients only, so they have no privacy cost. A tensor without a gradient
keeps its value and its optimiser state bit for bit. That matters for a resting factor, which does
not train in this step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lalora_app.adapter.factors import Adapter, Array
from lalora_app.settings.run_config import MethodNumbers, Train

if TYPE_CHECKING:
    import torch

    OptimizerFactory = Callable[
        ["list[ParameterGroup]", "OptimizerSettings"], torch.optim.Optimizer
    ]

ParameterGroup = dict[str, Any]


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings that an optimiser may read besides the gradients.

    Attributes:
        train: the table ``train`` of the run config.
        rule: the table ``rule`` of the run config.
        noise_std: standard deviation of the noise in one entry of the noised mean gradient.
        received: the adapter that the client has received, with the method's extra tensors.
    """

    train: Train
    rule: MethodNumbers
    noise_std: float = 0.0
    received: Mapping[str, Array] = field(default_factory=dict)


def configured_optimizer(
    groups: list[ParameterGroup], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Return the optimiser of the key ``train.optimizer``: SGD or AdamW."""
    import torch

    train = settings.train
    # foreach=True runs one operation for all tensors instead of one per tensor
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=train.weight_decay, foreach=True)
    return torch.optim.SGD(
        groups, momentum=train.momentum, weight_decay=train.weight_decay, foreach=True
    )


def lora_plus(groups: list[ParameterGroup], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """LoRA+: B's learning rate is ``rule.lr-ratio`` times A's learning rate (arXiv:2402.12354).

    Args:
        groups: one parameter group per kind of tensor, with the keys "kind" and "lr".
        settings: the settings of the run.
    """
    rates = {group["kind"]: group["lr"] for group in groups}
    scaled = [
        group | {"lr": settings.rule.lr_ratio * rates["A"]} if group["kind"] == "B" else group
        for group in groups
    ]
    return configured_optimizer(scaled, settings)


def low_pass_sgd(
    groups: list[ParameterGroup], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Return the optimiser of DOPPLER for every ``train.optimizer``."""
    from lalora_app.methods.noised_optimizers import LowPassSGD

    return LowPassSGD(groups, settings.train.weight_decay, settings.rule.filter_order)


def unbiased_adamw(
    groups: list[ParameterGroup], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Return the optimiser of DP-FedAdamW for every ``train.optimizer``."""
    from lalora_app.methods.noised_optimizers import UnbiasedAdamW

    return UnbiasedAdamW(groups, settings.noise_std, settings.train.weight_decay)


def guided_adamw(
    groups: list[ParameterGroup], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Return DP-FedAdamW's optimiser with the server's parts, for every ``train.optimizer``."""
    from lalora_app.methods.noised_optimizers import GuidedAdamW

    return GuidedAdamW(groups, settings)


def no_report(optimizer: torch.optim.Optimizer) -> Adapter:
    """Return no tensors: the upload holds nothing of the optimiser."""
    return {}


def second_moments(optimizer: torch.optim.Optimizer) -> Adapter:
    """DP-FedAdamW: return the mean second moment of each tensor, to be sent with the factors.

    Privacy: post-processing of noised gradients; no extra cost.
    """
    from lalora_app.methods.noised_optimizers import GuidedAdamW

    return optimizer.block_means() if isinstance(optimizer, GuidedAdamW) else {}
