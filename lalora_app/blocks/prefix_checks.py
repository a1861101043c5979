"""Refuse ``model.prefix-cache`` where a model cannot be divided at its first adapted block."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lalora_app.blocks.adapters import Targets
from lalora_app.blocks.prefix import Prefix
from lalora_app.blocks.stack import Stack
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Lora, Model

_HERE = "model.prefix-cache=true must be false"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of logits, relative to the largest


def division_of(
    stack: Stack | None, targets: Targets, model: Model, lora: Lora
) -> tuple[tuple[nn.Module, ...], int]:
    """Return the blocks and the number of the first adapted one, which must have a block below.

    Args:
        stack: the model's stack of blocks; None: it has no single one.
        targets: the adapted layers.
        model: the run config's table ``model``.
        lora: the run config's table ``lora``.

    Raises:
        ConfigError: naming the key, if the model or the adapters do not allow a cache.
    """
    if lora.kernel == "compiled":
        raise ConfigError(
            f'{_HERE} for lora.kernel="compiled": a compiled pass has no place to start from the '
            'cache; "fused" has'
        )
    if stack is None:
        raise ConfigError(
            f'{_HERE} for model.name="{model.name}": it has no single stack of equal blocks, such '
            "as the layers of BERT, so the cache cannot divide it"
        )
    blocks = [stack.block_of(path) for path in targets.paths]
    first = min(-1 if block is None else block for block in blocks)
    if first < 1:
        where = "outside of the blocks" if first < 0 else "in the first block"
        raise ConfigError(
            f"{_HERE} for adapters {where}: the cache cannot leave out any block; adapt the last "
            'blocks only, such as lora.layers="last:2"'
        )
    return stack.blocks, first


def _states_are_constant(
    prefix: Prefix, run: Callable[[], object], states: Tensor, trained: Sequence[nn.Parameter]
) -> bool:
    """Return whether the hidden states stay the same when all trained tensors change."""
    numbers = [parameter.detach().clone() for parameter in trained]
    try:
        for parameter in trained:
            nn.init.normal_(parameter, std=0.1)
        return torch.equal(prefix.states(run), states)
    finally:
        for parameter, old in zip(trained, numbers, strict=True):
            parameter.data.copy_(old)


@torch.no_grad()
def check_prefix(
    prefix: Prefix,
    logits: Callable[[], Tensor],
    mask: Tensor | None,
    trained: Sequence[nn.Parameter],
    *,
    model: Model,
    dtype: torch.dtype,
) -> None:
    """Check that states of the true tokens are constant and give the model's own logits.

    Args:
        prefix: the blocks below the first adapted one; it then knows the shape of their output.
        logits: computes the logits of a few random inputs.
        mask: (examples, tokens), 0 on padding, of these inputs; None: nothing is masked.
        trained: all trained tensors; their numbers are the same after the call.
        model: the run config's table ``model``.
        dtype: the type of the model's matrix products.

    Raises:
        ConfigError: if the states have another shape, or change while the model trains, or if the
            logits differ.

    Privacy: the inputs are random; no data is involved.
    """
    here = f'{_HERE} for model.name="{model.name}"'
    expected = logits()
    states = prefix.states(logits)
    if states.dim() != 3 or (mask is not None and states.shape[:2] != mask.shape):
        raise ConfigError(
            f"{here}: hidden states of the shape {tuple(states.shape)} are not (examples, tokens, "
            "features), so the cache cannot divide it"
        )
    if not _states_are_constant(prefix, logits, states, trained):
        raise ConfigError(
            f"{here}: what it computes below its first adapted block is not constant: layers there "
            "train whole, or it draws random numbers"
        )
    if mask is not None:
        states = states * mask[..., None].to(states)  # the cache holds no padding
    with prefix.starting_from(states):
        off = float((logits() - expected).abs().max())
    if not off <= _TOLERANCE[dtype] * float(expected.abs().max()):
        raise ConfigError(
            f"{here}: started at its first adapted block, it computes other logits, so the cache "
            "cannot divide it"
        )
