"""What a forward gives, what is lost by it and what is counted: one entry a kind of task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from lalora_app.data.encoding import IGNORED
from lalora_app.data.images import middle, resized_side

Forward = Callable[[Any, Tensor, Tensor | None], Tensor]  # (model, inputs, mask) -> logits
Metrics = dict[str, float]
METRICS = ("accuracy", "balanced_accuracy", "perplexity")  # every name that a task reports


def scores_of(row: Mapping[str, Any]) -> Metrics:
    """Return what a row of the history holds of a task's metrics."""
    return {name: row[name] for name in METRICS if name in row}


def told(scores: Metrics, between: str = "  ") -> str:
    """Return metrics in words."""
    return between.join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())


@dataclass(frozen=True)
class Task:
    """How logits are judged.

    Attributes:
        losses: (logits, labels) -> (examples,): the loss of each example on its own.
        count: (logits, labels) -> counts that add up over batches.
        metrics: the sum of the counts -> ``accuracy`` and one more.
    """

    losses: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor, Tensor], np.ndarray]
    metrics: Callable[[np.ndarray], Metrics]


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


def _class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def _confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return (labels, predictions) counts."""
    counts = np.zeros((logits.shape[1],) * 2)
    np.add.at(counts, (labels.cpu().numpy(), logits.argmax(1).cpu().numpy()), 1)
    return counts


def accuracies(confusion: np.ndarray) -> Metrics:
    """Return accuracy and balanced accuracy of a (labels, predictions) count matrix."""
    totals = confusion.sum(1)
    recalls = np.diag(confusion)[totals > 0] / totals[totals > 0]
    accuracy = float(np.trace(confusion) / totals.sum())
    return {"accuracy": accuracy, "balanced_accuracy": float(recalls.mean())}


def _next_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (examples, vocabulary, tokens - 1) logits and the tokens that they should be."""
    return logits[:, :-1].transpose(1, 2), labels[:, 1:]


def _sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (examples,): the mean over a text's own next tokens; 0 for a text of one token."""
    given, wanted = _next_tokens(logits, labels)
    each = cross_entropy(given, wanted, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)


def _token_counts(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return summed loss, right predictions and number of next tokens."""
    given, wanted = _next_tokens(logits, labels)
    loss = cross_entropy(given, wanted, reduction="sum", ignore_index=IGNORED)
    right = (given.argmax(1) == wanted).sum()
    return np.array([float(loss), float(right), float((wanted != IGNORED).sum())])


def _token_metrics(counts: np.ndarray) -> Metrics:
    """Return the accuracy of the next token, and the perplexity."""
    loss, right, _ = counts / max(counts[2], 1)
    return {"accuracy": float(right), "perplexity": float(np.exp(loss))}


CLASSIFICATION = Task(_class_losses, _confusion, accuracies)
LANGUAGE_MODEL = Task(_sequence_losses, _token_counts, _token_metrics)
