"""Examples as tensors, and the batches that the model takes."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lalora_app.data import Examples
from lalora_app.sources import DataError

IGNORED = -100  # the label of a position that has none, as in transformers
Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Batch:
    """What the model takes, and what it should say.

    Attributes:
        inputs: token ids (examples, tokens), or pixels (examples, 3, height, width) of 0 to 255.
        mask: (examples, tokens), 1 on tokens and 0 on padding; None where nothing is masked.
        labels: (examples,), or (examples, tokens) for a language model.
    """

    inputs: Tensor
    mask: Tensor | None
    labels: Tensor


class Encoded(ABC):
    """Examples ready to be batched."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def batch(self, indices: Indices) -> Batch:
        """Return the given examples."""

    def length(self, index: int) -> int:
        """Return what batches are sorted by, so that little is padded."""
        return 0

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield every example once, by length."""
        yield from self.micro_batches(range(len(self)), size)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[Batch]:
        """Yield the given examples in parts of at most ``size``, by length."""
        order = sorted(indices, key=self.length)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return (examples, tokens) ids, padded on the right, and their mask."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@dataclass(frozen=True)
class EncodedTexts(Encoded):
    """Texts to be classified, as token ids."""

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.labels)

    def length(self, index: int) -> int:
        """Return a text's number of tokens."""
        return len(self.tokens[index])

    def batch(self, indices: Indices) -> Batch:
        """Return the given texts, padded to the longest of them."""
        ids, mask = _padded([self.tokens[i] for i in indices], self.pad)
        return Batch(ids, mask, torch.tensor([self.labels[i] for i in indices]))


@dataclass(frozen=True)
class EncodedSequences(Encoded):
    """Texts whose every next token is to be predicted: one text is one example, never packed."""

    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.tokens)

    def length(self, index: int) -> int:
        """Return a text's number of tokens."""
        return len(self.tokens[index])

    def batch(self, indices: Indices) -> Batch:
        """Return the given texts, padded on the right, where no token of a text looks."""
        ids, mask = _padded([self.tokens[i] for i in indices], 0)
        return Batch(ids, None, ids.masked_fill(mask == 0, IGNORED))


@dataclass(frozen=True)
class EncodedImages(Encoded):
    """Images of one size, as stored; the model's device brings them to its own size."""

    pixels: Tensor  # (examples, 3, height, width), uint8
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batch(self, indices: Indices) -> Batch:
        """Return the given images."""
        rows = torch.as_tensor(np.asarray(indices))
        return Batch(self.pixels[rows], None, torch.tensor([self.labels[i] for i in indices]))


def _token_ids(examples: Examples, tokenizer: Any, max_length: int) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of texts or pairs of texts, cut at ``max_length``."""
    if any(isinstance(content, bytes) for content in examples.contents):
        raise DataError("data.input-column", " must hold texts for this model.task, not images")
    if not examples.contents:
        return ()
    pairs = isinstance(examples.contents[0], tuple)
    columns = zip(*examples.contents, strict=True) if pairs else [examples.contents]
    texts = [list(column) for column in columns]
    ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    for row, tokens in enumerate(ids):
        if not tokens:
            place = examples.row(row)
            raise DataError("data.input-column", f": the text of row {place} has no token")
    return tuple(map(tuple, ids))


@lru_cache(maxsize=32)
def encode_texts(examples: Examples, tokenizer: Any, max_length: int) -> EncodedTexts:
    """Return texts to classify as token ids; kept for the process's next use.

    Raises:
        DataError: if they are no texts, or a text has no token.
    """
    ids = _token_ids(examples, tokenizer, max_length)
    return EncodedTexts(ids, examples.labels, tokenizer.pad_token_id)


@lru_cache(maxsize=32)
def encode_sequences(examples: Examples, tokenizer: Any, max_length: int) -> EncodedSequences:
    """Return texts to model as token ids; kept for the process's next use.

    Raises:
        DataError: if they are no texts, or a text has no token.
    """
    return EncodedSequences(_token_ids(examples, tokenizer, max_length))


def resized_side(side: int, shorter: int, resize: int) -> int:
    """Return a side's pixels once the shorter one has ``resize``, as torchvision rounds them."""
    return resize * side // shorter


def middle(side: int, size: int) -> int:
    """Return where the middle ``size`` pixels of a side begin, as torchvision rounds it."""
    return round((side - size) / 2)


def _decoded(content: object, row: int) -> Any:
    """Return one image, in RGB."""
    from PIL import Image

    if not isinstance(content, bytes):
        raise DataError("data.input-column", " must hold images for this model.task, not texts")
    try:
        image: Any = Image.open(io.BytesIO(content))
        if image.mode.startswith("I;16"):  # PIL would cut 16 bits off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # the decoders raise many kinds; all mean the same here
        raise DataError("data.input-column", f": row {row} is no readable image") from error


def _cut(image: Any, resize: int, size: int) -> Any:
    """Return the image with its shorter side resized, and a square cut out of its middle."""
    from PIL import Image

    width, height = (resized_side(side, min(image.size), resize) for side in image.size)
    left, top = middle(width, size), middle(height, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


@lru_cache(maxsize=32)
def encode_images(examples: Examples, resize: int, size: int) -> EncodedImages:
    """Return decoded images; kept for the process's next use.

    Images that all have one size stay as they are, for the model's device to resize. Others are
    brought to the model's size here.

    Args:
        examples: the bytes of image files.
        resize: pixels of the shorter side before the square is cut out.
        size: pixels of the square's side.

    Raises:
        DataError: if an image cannot be read.
    """
    images = [_decoded(content, examples.row(i)) for i, content in enumerate(examples.contents)]
    if len({image.size for image in images}) > 1:
        images = [_cut(image, resize, size) for image in images]
    arrays = [np.array(image) for image in images]
    stacked = np.stack(arrays) if arrays else np.zeros((0, size, size, 3), np.uint8)
    pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    return EncodedImages(pixels, examples.labels)
