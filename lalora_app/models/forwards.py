"""Forward passes of each kind of task, from inputs to logits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lalora_app.data.images import middle, resized_side

Forward = Callable[[Any, Tensor, Tensor | None], Tensor]  # (model, inputs, mask) -> logits


def whole_mask(mask: Tensor) -> Tensor:
    """Return (examples, 1, tokens, tokens): true if a token may attend to another."""
    return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


# Models whose tokens attend to all tokens but padding. A 4-D mask would override the causal or
# local attention of other models.
_SEE_ALL = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"}


def attention(mask: Tensor | None, model: Any) -> Tensor | None:
    """Return the model's attention mask for a mask of (examples, tokens).

    transformers reads the values of a 2-D mask to look for padding, so the host would wait for the
    GPU; it uses a 4-D mask without reading it.
    """
    if mask is None or mask.device.type == "cpu":
        return mask
    own = model.config
    ready = own.model_type in _SEE_ALL and own._attn_implementation == "sdpa"
    return whole_mask(mask) if ready and not getattr(own, "is_decoder", False) else mask


def text_logits(
    model: Any, inputs: Tensor, mask: Tensor | None, segment: Tensor | None = None
) -> Tensor:
    """Return (examples, labels) of a transformers model that classifies texts.

    Args:
        model: a transformers model.
        inputs: (examples, tokens) ids.
        mask: (examples, tokens), 0 on padding.
        segment: (examples, tokens), 0 or 1 for the first or second text; None: not given.
    """
    segments_given = {} if segment is None else {"token_type_ids": segment}
    visible = attention(mask, model)
    out: Tensor = model(input_ids=inputs, attention_mask=visible, **segments_given).logits.float()
    return out


def mean_logits(
    model: Any, inputs: Tensor, mask: Tensor | None, segment: Tensor | None = None
) -> Tensor:
    """Return (examples, labels): the mean of a token classifier's logits over the tokens."""
    return masked_mean(text_logits(model, inputs, mask, segment), mask)


def segments(inputs: Tensor, separator: int) -> Tensor:
    """Return (examples, tokens): 0 up to the first separator, 1 after it and on padding."""
    ends = (inputs == separator).long()
    return (ends.cumsum(1) - ends).clamp(max=1)


@dataclass(frozen=True)
class Segmented:
    """A forward of texts that gives the model the segments of a pair, as BERT needs.

    Limit: a separator token inside a text ends the text.

    Attributes:
        forward: the forward pass, with the segments as its last argument.
        separator: the id of the token that ends a text.
    """

    forward: Callable[[Any, Tensor, Tensor | None, Tensor], Tensor]
    separator: int

    def __call__(self, model: Any, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return (examples, labels)."""
        return self.forward(model, inputs, mask, segments(inputs, self.separator))


def masked_mean(token_logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return (examples, labels): the mean of (examples, tokens, labels) over unmasked tokens.

    The head is linear, so this is the head applied to the mean-pooled hidden states.
    """
    if mask is None:
        return token_logits.mean(1)
    weights = mask[..., None].to(token_logits)
    return (token_logits * weights).sum(1) / weights.sum(1)


def causal_logits(model: Any, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return (examples, tokens, vocabulary) of a language model; padding is on the right.

    No mask is needed: tokens attend only to earlier ones, and padding comes last.
    """
    out: Tensor = model(input_ids=inputs, use_cache=False).logits.float()
    return out


@dataclass(frozen=True)
class Pixels:
    """Preparation of stored pixels for a model: resize, cut, normalise.

    Attributes:
        resize: the pixels of the shorter side, before a square is cut out of the middle.
        size: the pixels of the square's side.
        mean: the mean of each colour, from 0 to 1, in the model's own training.
        std: the standard deviation of each colour.
    """

    resize: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalisation(self) -> str:
        """Mean and standard deviation of the colours as JSON."""
        return json.dumps([self.mean, self.std])

    def __call__(self, images: Tensor) -> Tensor:
        """Return (examples, 3, size, size) from uint8 (examples, 3, height, width)."""
        scaled = images.float() / 255
        if images.shape[2:] != (self.size, self.size):
            scaled = self._cut(scaled)
        colours = zip(scaled.unbind(1), self.mean, self.std, strict=True)
        # Python numbers, so that no tensor has to be copied to a GPU.
        return torch.stack([(colour - mean) / std for colour, mean, std in colours], dim=1)

    def _cut(self, images: Tensor) -> Tensor:
        shorter = min(images.shape[2:])
        height, width = (resized_side(side, shorter, self.resize) for side in images.shape[2:])
        resized = interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = middle(height, self.size), middle(width, self.size)
        return resized[:, :, top : top + self.size, left : left + self.size]


def image_logits(pixels: Pixels, model: Any, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return (examples, labels) of a transformers model that classifies images."""
    out: Tensor = model(pixel_values=pixels(inputs)).logits.float()
    return out


def timm_logits(pixels: Pixels, model: Any, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return (examples, labels) of a timm model."""
    out: Tensor = model(pixels(inputs)).float()
    return out
