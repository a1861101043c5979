"""Add LoRA to the chosen layers of a model by PEFT, or let their whole weights train."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lalora_app.adapter.whole_linear import WholeLinear
from lalora_app.blocks.stack import Stack
from lalora_app.settings.run_config import Lora

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Targets:
    """The Linear layers with an adapter, and how PEFT's config names them.

    Attributes:
        paths: the path of every layer.
        names: PEFT's ``target_modules``: names, or paths.
        blocks: PEFT's ``layers_to_transform``: the blocks in which names count; None: in all, and
            outside of them.
        pattern: PEFT's ``layers_pattern``: the name of the list of blocks; None with ``blocks``.
    """

    paths: list[str]
    names: list[str]
    blocks: list[int] | None = None
    pattern: str | None = None


def targets_in(stack: Stack, blocks: range, names: list[str], paths: list[str]) -> Targets:
    """Return the layers in some blocks of a stack.

    PEFT looks for the block's number behind ``.pattern.``, and a path among its names counts in any
    block. Where this does not select exactly these layers, they are named by their paths.
    """
    kept = [path for path in paths if stack.block_of(path) in blocks]
    before, _, pattern = stack.path.rpartition(".")
    in_stack = [stack.block_of(path) is not None for path in paths]
    found = [path.count(f".{pattern}.") for path in paths]
    if not before or found != [int(inside) for inside in in_stack] or set(names) & set(paths):
        return Targets(kept, kept)
    return Targets(kept, names, list(blocks), pattern)


def _drop_nothing(layer: nn.Module) -> None:
    """Set the layer's own dropout rates to 0; OPT has such rates and no module for them."""
    rates = [name for name, value in vars(layer).items() if isinstance(value, float)]
    for name in rates:
        if "dropout" in name:
            setattr(layer, name, 0.0)


def _let_checkpoint(model: nn.Module) -> None:
    """Let transformers' layers recompute: they do so in training mode only, and nothing below."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            _drop_nothing(module)


def wire_name(parameter: str) -> str:
    """Return PEFT's saved name of a trainable parameter of a PEFT model."""
    return parameter.replace(".modules_to_save.default", "").replace(".default", "")


def with_adapters(
    base: nn.Module, lora: Lora, targets: Targets, *, trained: Sequence[str], task_type: str | None
) -> nn.Module:
    """Return the PEFT model of a base model, in eval mode for good.

    The frozen backbone trains no statistics and drops nothing: the noise of the private step
    regularises more than dropout would.

    Args:
        base: the base model, changed in place.
        lora: the run config's table ``lora``.
        targets: the layers to adapt.
        trained: the names of the modules that train whole.
        task_type: PEFT's name of the task, or None.
    """
    from peft import LoraConfig

    settings = LoraConfig(
        task_type=task_type,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets.names,
        layers_to_transform=targets.blocks,
        layers_pattern=targets.pattern,
        modules_to_save=list(trained) or None,
    )
    return _peft_model(base, settings)


def with_whole_weights(
    base: nn.Module, targets: Targets, *, trained: Sequence[str], task_type: str | None
) -> nn.Module:
    """Return the model with :class:`WholeLinear` layers, in eval mode for good.

    It is a PEFT model without LoRA layers: PEFT keeps the head, as for LoRA.

    Args:
        base: the base model, changed in place.
        targets: the layers whose whole weights train.
        trained: the names of the modules that train whole.
        task_type: PEFT's name of the task, or None.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    settings = LoraConfig(
        task_type=task_type,
        target_modules=DUMMY_TARGET_MODULES,  # no LoRA layer
        modules_to_save=list(trained) or None,
    )
    adapted = _peft_model(base, settings)
    for path in targets.paths:
        base.set_submodule(path, WholeLinear(cast(nn.Linear, base.get_submodule(path))))
    return adapted


def _peft_model(base: nn.Module, settings: "LoraConfig") -> nn.Module:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        adapted: nn.Module = get_peft_model(cast(Any, base), settings).eval()
    _let_checkpoint(adapted)
    return adapted
