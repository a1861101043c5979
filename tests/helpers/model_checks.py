"""Inputs of tiny models, and the models made ready for a test."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import timm_class
from helpers.oracle import randomise, without_engine
from lalora_app.data.encoding import EncodedImages, EncodedSequences, EncodedTexts
from lalora_app.models.backbone import Backbone, build
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

IMAGES = {"model.task": "image-classification", "model.pooling": "model"}


def pixels(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """What a model sees, by the book."""
    centre, spread = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    return (images / 255 - centre) / spread


def bare(backbone: Backbone) -> nn.Module:
    """The base model inside of the adapters."""
    return backbone.model.base_model.model


def refusal(config: Config) -> str:
    """The one line by which a model is refused."""
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def randomised(config: Config) -> Backbone:
    """The backbone with every tensor random and active: B at zero would hide A's gradient."""
    backbone, _ = build(config)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    torch.manual_seed(0)
    for parameter in backbone.engine.parameters.values():
        nn.init.normal_(parameter, std=0.3)
    return backbone


TEXT_BATCH = EncodedTexts(((2, 5, 6, 3), (2, 7, 3), (2, 8, 9, 10, 11, 3)), (0, 1, 0), pad=0)
LANGUAGE_BATCH = EncodedSequences(((2, 5, 6, 3), (2, 7, 3), (2, 8, 9, 10, 11, 3)))
IMAGE_BATCH = EncodedImages.of_one_size(pixels(3, 16), (0, 1, 0))


def stock(kind: str, folder: str, labels: int = 2) -> nn.Module:
    """The base model with a head of its own, as anyone would load it."""
    from transformers import AutoModelForImageClassification

    torch.manual_seed(99)  # its own head is another one
    if kind == "hf-vit":
        options = {"num_labels": labels, "ignore_mismatched_sizes": True}
        return AutoModelForImageClassification.from_pretrained(folder, **options)
    model = timm_class(kind, num_classes=labels)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    return model


def damaged(folder: str, copy: Path, file: str, content: bytes | None) -> str:
    """Copy a model's folder with one file missing, or with other content in it."""
    shutil.copytree(folder, copy)
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    return str(copy)


# --- losses of tiny models in float64 ---

FUSED = (("fused", False),)
PHASES = [("AB", 3), ("B", 4), ("A", 1)]
TEXTS = EncodedTexts(
    ((2, 5, 6, 7, 3), (2, 7, 3), (2, 8, 9, 10, 11, 12, 9, 3), (2, 8, 5, 3)), (0, 1, 0, 1), pad=0
)


def text_losses(model: nn.Module, indices: list[int]) -> Tensor:
    batch = TEXTS.batch(indices)  # padded to the longest; a single text has no padding
    logits = model(input_ids=batch.inputs, attention_mask=batch.mask).logits
    return nn.functional.cross_entropy(logits, batch.labels, reduction="none")


PIXELS = normalised(pixels(4, 16).double(), [0.4] * 3, [0.2] * 3)
LABELS = torch.tensor([0, 1, 1, 0])


def image_losses(model: nn.Module, indices: list[int]) -> Tensor:
    out = model(PIXELS[indices])
    logits = getattr(out, "logits", out)
    return nn.functional.cross_entropy(logits, LABELS[indices], reduction="none")


def active(backbone: Backbone) -> nn.Module:
    """The model in float64, every factor random and active."""
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    model = randomise(without_engine(backbone.model))
    getattr(model, "config", model)._experts_implementation = "eager"  # the other takes no float64
    return model
