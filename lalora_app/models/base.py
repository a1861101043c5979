"""A base model with its task, forward pass and preprocessing, for every model library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        targets: the usual choices of layers for ``lora.targets="auto"``, each as names separated
            by commas; the first that the model has is taken.
        trained: the names of the modules that train whole: the head and missing weights.
        task_type: PEFT's name of the task, or None.
        preprocessing: the state of the tokenizer or of the images' normalisation, by name.
        processor: the tokenizer of texts, or the :class:`Pixels` of images.
    """

    model: nn.Module
    task: Task
    forward: Forward
    encode: Callable[[Examples], Encoded]
    probe: Batch
    targets: tuple[str, ...]
    trained: tuple[str, ...]
    task_type: str | None
    preprocessing: Mapping[str, str]
    processor: Any


def _random_ids(words: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(words), (_PROBE_EXAMPLES, _PROBE_TOKENS), generator=generator)
    return torch.tensor(words)[places]


def language_probe(words: Sequence[int]) -> Batch:
    """Return a few random texts for a check of a language model without data."""
    ids = _random_ids(words)
    return Batch(ids, None, ids)


def text_probe(words: Sequence[int], end: int | None, pad: int) -> Batch:
    """Return a few random texts to classify, for a check without data.

    The last text is padded: the rows of some models, for example without padding, do not divide
    into examples only if the lengths differ.

    Args:
        words: the ids of ordinary tokens.
        end: the id of the token that ends every text; None: there is none.
        pad: the id of the padding token.
    """
    ids = _random_ids(words)
    lengths = torch.tensor([_PROBE_TOKENS] * (_PROBE_EXAMPLES - 1) + [_PROBE_TOKENS - 2])[:, None]
    places = torch.arange(_PROBE_TOKENS)
    if end is not None:
        ids = ids.masked_fill(places == lengths - 1, end)
    mask = (places < lengths).long()
    return Batch(ids.masked_fill(mask == 0, pad), mask, torch.arange(_PROBE_EXAMPLES) % 2)


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
