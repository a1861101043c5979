"""What a forward gives, what is lost by it and what is counted: one entry a kind of task."""

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
    """Return (examples, 1, tokens, tokens), true where a token may be looked at."""
    return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


# Every token looks at every other that is no padding. Of other models a ready mask would take away
# that a token sees none after it, or only its neighbours.
_SEE_ALL = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"}


def attention(mask: Tensor | None, model: Any) -> Tensor | None:
    """Return what the model takes as its attention mask, for (examples, tokens).

    transformers reads a 2-D mask's values to find that nothing is padded, for which a GPU would
    have to be waited for; a ready 4-D mask is taken as it is.
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
        model: of transformers.
        inputs: (examples, tokens) ids.
        mask: (examples, tokens), 0 on padding.
        segment: (examples, tokens), which of a pair's texts a token is of; None: not told.
    """
    told_apart = {} if segment is None else {"token_type_ids": segment}
    seen = attention(mask, model)
    out: Tensor = model(input_ids=inputs, attention_mask=seen, **told_apart).logits.float()
    return out


def mean_logits(
    model: Any, inputs: Tensor, mask: Tensor | None, segment: Tensor | None = None
) -> Tensor:
    """Return (examples, labels): the mean of a token classifier's logits over the tokens."""
    return masked_mean(text_logits(model, inputs, mask, segment), mask)


def segments(inputs: Tensor, separator: int) -> Tensor:
    """Return (examples, tokens): 0 up to the first separator, 1 behind it, where padding is too."""
    ends = (inputs == separator).long()
    return (ends.cumsum(1) - ends).clamp(max=1)


@dataclass(frozen=True)
class Segmented:
    """A forward of texts that tells the second text of a pair from the first, as BERT does.

    Limit: a separator that is written out in a text ends it.

    Attributes:
        forward: takes the segments last.
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

    No mask: a token looks at itself and those before it, and padding comes after all of them.
    """
    out: Tensor = model(input_ids=inputs, use_cache=False).logits.float()
    return out


@dataclass(frozen=True)
class Pixels:
    """What stored pixels become before a model sees them.

    Attributes:
        resize: pixels of the shorter side, before a square is cut out of the middle.
        size: pixels of the square's side.
        mean: of each colour, on the scale from 0 to 1, that the model was trained with.
        std: of each colour.
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
        # Numbers and no tensor: nothing has to be copied to a GPU.
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
