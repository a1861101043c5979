"""A base model with its task, forward pass and preprocessing, for every model library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lalora_app.data.encoding import Batch, Encoded
from lalora_app.data.examples import Examples
from lalora_app.models.forwards import Forward
from lalora_app.models.scores import Task
from lalora_app.settings.errors import ConfigError, first_line
from lalora_app.settings.run_config import Model

_PROBE_EXAMPLES, _PROBE_TOKENS = 3, 6


@dataclass(frozen=True)
class Base:
    """A base model with its task, forward pass and preprocessing.

    Attributes:
        model: the model with a fresh head, in float32.
        task: the losses and metrics of its logits.
        forward: (model, inputs, mask) -> logits.
        encode: examples -> encoded examples.
        probe: a few random inputs for the check of the layout.
        targets: the names of the layers that LoRA adapts for ``lora.targets="auto"``.
        trained: the names of the modules that train whole: the head and missing weights.
        task_type: PEFT's name of the task, or None.
        preprocessing: the state of the tokenizer or of the images' normalisation, by name.
    """

    model: nn.Module
    task: Task
    forward: Forward
    encode: Callable[[Examples], Encoded]
    probe: Batch
    targets: str
    trained: tuple[str, ...]
    task_type: str | None
    preprocessing: Mapping[str, str]


def token_probe(vocabulary: int, task: str) -> Batch:
    """Return a few random texts for a check without data."""
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_EXAMPLES, _PROBE_TOKENS)
    ids = torch.randint(vocabulary, shape, generator=generator)
    if task == "causal-lm":
        return Batch(ids, None, ids)
    return Batch(ids, torch.ones_like(ids), torch.arange(_PROBE_EXAMPLES) % 2)


def pixel_probe(size: int) -> Batch:
    """Return a few random images for a check without data."""
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_EXAMPLES, 3, size, size)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Batch(pixels, None, torch.arange(_PROBE_EXAMPLES) % 2)


def require_size(model: Model, own: int | list[int] | None) -> None:
    """Check that the images' size in the config is the model's own.

    Args:
        model: the run config's table ``model``.
        own: the size that the model takes in pixels; None: any size.

    Raises:
        ConfigError: if the sizes differ.
    """
    if own is not None and own not in (model.image_size, [model.image_size] * 2):
        raise ConfigError(f"model.image-size={model.image_size} must be {own}, the model's own")


def cannot_load(model: Model, error: Exception) -> ConfigError:
    """Return the error of a model that cannot be loaded, in one line with its reason."""
    return ConfigError(f'model.name="{model.name}" cannot be loaded: {first_line(error)}')
