"""Divide a model for ``model.prefix-cache``, or refuse it where it cannot be divided."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lalora_app.blocks.adapters import Targets
from lalora_app.blocks.prefix import FrozenPart, Prefix
from lalora_app.blocks.stack import Stack
from lalora_app.blocks.trunk import Trunk, head_of
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Lora, Model

_HERE = "model.prefix-cache=true must be false"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of logits, relative to the largest


def division_of(
    stack: Stack | None, targets: Targets, model: Model
) -> tuple[tuple[nn.Module, ...], int]:
    """Return the blocks and the number of the first adapted one, which must have a block below.

    Args:
        stack: the model's stack of blocks; None: it has no single one.
        targets: the adapted layers.
        model: the run config's table ``model``.

    Raises:
        ConfigError: naming the key, if the model or the adapters do not allow a cache.
    """
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


@contextmanager
def _redrawn(trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give all trained tensors random numbers within the block: some of them start at zero."""
    numbers = [parameter.detach().clone() for parameter in trained]
    try:
        for parameter in trained:
            nn.init.normal_(parameter, std=0.1)
        yield
    finally:
        for parameter, old in zip(trained, numbers, strict=True):
            parameter.data.copy_(old)


@dataclass(frozen=True)
class Probe:
    """A forward pass of a model on a few random inputs.

    Attributes:
        logits: computes the logits.
        mask: (examples, tokens), 0 on padding, of the inputs; None: nothing is masked.
        model: the run config's table ``model``.
        dtype: the type of the model's matrix products.
    """

    logits: Callable[[], Tensor]
    mask: Tensor | None
    model: Model
    dtype: torch.dtype


@torch.no_grad()
def check_prefix(part: FrozenPart, probe: Probe, trained: Sequence[nn.Parameter]) -> None:
    """Check that states of the true tokens are constant and give the model's own logits.

    Args:
        part: the frozen part of the model; it then knows the shape of its output.
        probe: a pass on random inputs.
        trained: all tensors that train; their numbers are the same after the call.

    Raises:
        ConfigError: if the states have another shape, or change while the model trains, or if the
            logits differ.

    Privacy: the inputs are random; no data is involved.
    """
    here = f'{_HERE} for model.name="{probe.model.name}"'
    states = part.states(probe.logits)
    mask = probe.mask if part.per_token else None
    if states.dim() != 3 or (mask is not None and states.shape[:2] != mask.shape):
        raise ConfigError(
            f"{here}: hidden states of the shape {tuple(states.shape)} are not (examples, tokens, "
            "features), so the cache cannot divide it"
        )
    padless = states if mask is None else states * mask[..., None].to(states)  # as in the cache
    with _redrawn(trained):
        constant = torch.equal(part.states(probe.logits), states)
        expected = probe.logits()
        with part.starting_from(padless):
            off = float((probe.logits() - expected).abs().max())
    if not constant:
        raise ConfigError(
            f"{here}: what it computes below its first adapted block is not constant: layers there "
            "train whole, or it draws random numbers"
        )
    if not off <= _TOLERANCE[probe.dtype] * float(expected.abs().max()):
        raise ConfigError(
            f"{here}: started at its first adapted block, it computes other logits, so the cache "
            "cannot divide it"
        )


def trunk_of(model: nn.Module, probe: Probe, identity: str) -> Trunk | None:
    """Return all below the head, for a method that trains the head alone; None: not divisible.

    Args:
        model: the PEFT model, whose factors give a product of zero.
        probe: a pass on random inputs.
        identity: a text that changes whenever the head's input may change.
    """
    head = head_of(model)
    if head is None:
        return None
    part = Trunk(model, head, identity)
    try:
        check_prefix(part, probe, [p for p in head.parameters() if p.requires_grad])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a head may raise on its input alone: the blocks can be divided
        return None
    return part


def divided(
    model: nn.Module,
    stack: Stack | None,
    targets: Targets,
    probe: Probe,
    identity: str,
    *,
    lora: Lora,
    head_alone: bool,
) -> FrozenPart:
    """Return the frozen part of a model: all below the head, or the blocks below the adapters.

    Args:
        model: the PEFT model.
        stack: the model's stack of blocks; None: it has no single one.
        targets: the adapted layers.
        probe: a pass on random inputs.
        identity: a text that changes whenever the states of an example may change.
        lora: the run config's table ``lora``.
        head_alone: whether the method trains the head alone, so that B·A stays zero.

    Raises:
        ConfigError: naming the key, if the model or the adapters do not allow a cache.
    """
    if lora.kernel == "compiled":
        raise ConfigError(
            f'{_HERE} for lora.kernel="compiled": a compiled pass has no place to start from the '
            'cache; "fused" has'
        )
    trunk = trunk_of(model, probe, identity) if head_alone else None
    if trunk is not None:
        return trunk
    try:
        blocks = Prefix(*division_of(stack, targets, probe.model), identity)
        check_prefix(blocks, probe, [p for p in model.parameters() if p.requires_grad])
    except ConfigError as error:
        if not head_alone:
            raise
        raise ConfigError(
            f'{error}; method="head-only" would need no adapters there, but the head of this model '
            "does not compute from one input alone"
        ) from error
    return blocks
