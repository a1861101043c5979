"""Choose the Linear layers that LoRA adapts, and refuse those that it cannot train."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lalora_app.blocks.adapters import Targets, targets_in
from lalora_app.blocks.stack import Stack, find_stack
from lalora_app.models.base import Base
from lalora_app.settings.errors import ConfigError, first_line
from lalora_app.settings.run_config import Lora, Model

ALL_LINEAR = "all-linear"  # PEFT's own word
_NO_CALL = "the model reads its weight without calling it, so PEFT's LoRA would have no effect"
_SHARED = "it sees rows that belong to no example"
_HEAD = "it belongs to the head or to another module that trains whole"
_OUTPUT = "it is the output layer of the language model"


def _names(targets: str) -> list[str]:
    return [name.strip() for name in targets.split(",") if name.strip()]


def _is_target(path: str, names: Sequence[str]) -> bool:
    """Return whether PEFT adapts the module at a path, which is a target or ends in one."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def linear_layers(base: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers of a base model by path."""
    return {path: m for path, m in base.named_modules() if isinstance(m, nn.Linear)}


def rows_per_call(base: Base, examples: int) -> dict[str, list[int]]:
    """Return the number of rows that every Linear layer sees, one entry per call.

    Args:
        base: the base model, in eval mode; its probe has at least ``examples`` inputs.
        examples: number of inputs of the one forward pass.
    """
    layers = linear_layers(base.model)
    rows: dict[str, list[int]] = {path: [] for path in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, seen=rows[path]: seen.append(inputs[0].shape[:-1].numel())
        )
        for path, layer in layers.items()
    ]
    mask = None if base.probe.mask is None else base.probe.mask[:examples]
    try:
        # With gradients: without them, some modules of torch compute without calling their layers.
        with torch.enable_grad():
            base.forward(base.model, base.probe.inputs[:examples], mask)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _trains_whole(path: str, trained: Sequence[str]) -> bool:
    """Return whether PEFT trains all weights of a module, without LoRA.

    PEFT does so if the path of the module or of a parent ends in a name of ``trained``.
    """
    outer = [path[: m.start()] for m in re.finditer(r"\.|$", path)]
    return any(part.endswith(name) for part in outer for name in trained)


def _reason(path: str, base: Base, output: object, one: list[int], two: list[int]) -> str | None:
    if _trains_whole(path, base.trained):
        return _HEAD
    if base.model.get_submodule(path) is output:
        return _OUTPUT
    if not one:
        return _NO_CALL
    return None if two == [2 * rows for rows in one] else _SHARED


def reasons_against(base: Base) -> dict[str, str | None]:
    """Return for every Linear layer the reason why LoRA cannot train it; None if it can.

    The model computes one and two inputs of its probe: a layer whose number of rows does not
    double sees rows that belong to no example.

    Args:
        base: the base model, changed to eval mode.

    Privacy: the probe is random; no data is involved.
    """
    base.model.eval()
    one, two = rows_per_call(base, 1), rows_per_call(base, 2)
    output = getattr(base.model, "get_output_embeddings", lambda: None)()
    return {path: _reason(path, base, output, one[path], two[path]) for path in one}


def _last_names(reasons: Mapping[str, str | None]) -> str:
    return ", ".join(
        sorted({path.split(".")[-1] for path, reason in reasons.items() if not reason})
    )


def _of_auto(base: Base, reasons: Mapping[str, str | None]) -> list[str] | None:
    """Return the first of the usual targets that the model has and can train; None if none."""
    paths = [path for path, _ in base.model.named_modules()]
    for candidate in map(_names, base.targets):
        matches = {name: [p for p in paths if _is_target(p, [name])] for name in candidate}
        found = [path for own in matches.values() for path in own]
        if all(matches.values()) and all(reasons.get(path, "no Linear") is None for path in found):
            return candidate
    return None


def _of_config(
    base: Base, lora: Lora, names: list[str], reasons: Mapping[str, str | None]
) -> list[str]:
    """Return the names; or the paths of their layers, where a name also fits a layer of the head.

    The head trains whole, so names such as ``dense`` do not select its layers.
    """
    matches = [path for path, _ in base.model.named_modules() if _is_target(path, names)]
    outside = [path for path in matches if reasons.get(path) != _HEAD]
    linear = f"Linear layers of the model, such as {_last_names(reasons)}"
    if not outside or any(path not in reasons for path in outside):
        raise ConfigError(f'lora.targets="{lora.targets}" must name {linear}')
    if unused := [name for name in names if not any(_is_target(p, [name]) for p in outside)]:
        raise ConfigError(
            f'lora.targets="{lora.targets}" must name {linear}, and "{unused[0]}" names none'
        )
    for path in outside:
        if reasons[path]:
            raise ConfigError(
                f'lora.targets="{lora.targets}" must leave out {path}: {reasons[path]}; it may '
                f"name {linear}"
            )
    return names if outside == matches else outside


def _target_names(base: Base, lora: Lora, reasons: Mapping[str, str | None]) -> list[str]:
    """Return the names or paths of the layers that ``lora.targets`` selects in the whole model."""
    if lora.targets == ALL_LINEAR:
        return [path for path, reason in reasons.items() if not reason]
    names = _of_auto(base, reasons) if lora.targets == "auto" else _names(lora.targets)
    return _of_config(base, lora, names or [], reasons)


def stack_of(base: Base) -> Stack | None:
    """Return the single stack of equal blocks of a base model in eval mode; None: no such stack."""
    mask = None if base.probe.mask is None else base.probe.mask[:1]
    return find_stack(base.model, lambda: base.forward(base.model, base.probe.inputs[:1], mask))


def _require_stack(base: Base, model: Model, lora: Lora, last: int) -> Stack:
    stack, here = stack_of(base), f'lora.layers="{lora.layers}"'
    if stack is None:
        raise ConfigError(
            f'{here} must be "all" for model.name="{model.name}": it has no single stack of equal '
            "blocks, such as the layers of BERT; Swin and ConvNeXt have several, and ALBERT calls "
            "one block several times"
        )
    if last > len(stack.blocks):
        raise ConfigError(
            f'{here} must be at most "last:{len(stack.blocks)}", the number of blocks of '
            f'model.name="{model.name}"'
        )
    return stack


def _in_last_blocks(
    base: Base, model: Model, lora: Lora, last: int, names: list[str], paths: list[str]
) -> Targets:
    stack = _require_stack(base, model, lora, last)
    count = len(stack.blocks)
    found = targets_in(stack, range(count - last, count), names, paths)
    asked = [] if lora.targets in ("auto", ALL_LINEAR) else _names(lora.targets)
    unused = [name for name in asked if not any(_is_target(p, [name]) for p in found.paths)]
    if unused or not found.paths:
        where = f"{stack.path}.{count - last}" + (f" to {count - 1}" if last > 1 else "")
        what = f', and "{unused[0]}" names none' if unused else ""
        raise ConfigError(
            f'lora.targets="{lora.targets}" must name Linear layers of the blocks {where} for '
            f'lora.layers="{lora.layers}"{what}'
        )
    return found


def choose_targets(base: Base, model: Model, lora: Lora) -> Targets:
    """Return the layers to adapt: those of the config, the architecture's own, or all.

    With ``all-linear`` these are the paths of all Linear layers but the head, the output layer of a
    language model, and the layers that LoRA cannot train, see :func:`reasons_against`.

    Args:
        base: the base model, changed to eval mode.
        model: the run config's table ``model``, for errors.
        lora: the run config's table ``lora``.

    Raises:
        ConfigError: if a target is no Linear layer, cannot be trained, or no layer can be; if
            ``lora.layers`` names blocks that the model does not have.
    """
    try:
        reasons = reasons_against(base)
    except Exception as error:  # whatever a model may raise: it cannot be run as it is
        raise ConfigError(
            f'model.name="{model.name}" fails on random inputs: {first_line(error)}'
        ) from error
    if all(reasons.values()):
        raise ConfigError(
            f'model.name="{model.name}" must have Linear layers outside its head: LoRA trains no '
            "convolutions; ViT, Swin and ConvNeXt have such layers"
        )
    names = _target_names(base, lora, reasons)
    paths = [path for path in reasons if _is_target(path, names)]
    if lora.last_blocks is None:
        return Targets(paths, names)
    return _in_last_blocks(base, model, lora, lora.last_blocks, names, paths)


def check_rank(base: Base, targets: Targets, rank: int) -> None:
    """Check that the rank is at most the smaller side of every target layer.

    Raises:
        ConfigError: with the largest possible rank.
    """
    layers = map(linear_layers(base.model).__getitem__, targets.paths)
    largest = min(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > largest:
        raise ConfigError(
            f"lora.rank={rank} must be at most {largest}, the smallest target layer (for sd-lora: "
            "lora.rank times rule.tasks)"
        )
