"""Examples as tensors, and the batches that the model takes."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lalora_app.data.encoded_cache import EncodedCache
from lalora_app.data.examples import Examples
from lalora_app.settings.errors import DataError

IGNORED = -100  # label of a position without a label, as in transformers
UNLIMITED = sys.maxsize
SHORTEST = 8  # tokens to which a text is padded at least
CACHE_BYTES = 1 << 30  # of each kind of encoded data, per process
_TOKEN_BYTES, _ROW_BYTES = 36, 64  # a Python integer with its place in a tuple; an empty tuple
Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Batch:
    """The model's inputs and the expected outputs.

    Attributes:
        inputs: token ids (examples, tokens), or pixels (examples · views, 3, height, width) of 0
            to 255, with the views of an example side by side.
        mask: (examples, tokens), 1 on tokens and 0 on padding; None: nothing is masked.
        labels: (examples,), or (examples, tokens) for a language model.
        states: (examples, tokens, features), the output of the model's frozen part; None: the whole
            model computes.
        views: number of views of each example.
    """

    inputs: Tensor
    mask: Tensor | None
    labels: Tensor
    states: Tensor | None = None
    views: int = 1


class Encoded(ABC):
    """Examples ready to be batched."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given examples; texts are padded to at least ``width`` tokens."""

    def length(self, index: int) -> int:
        """Return the number by which batches are sorted, so that little is padded."""
        return 0

    @abstractmethod
    def width(self, index: int) -> int:
        """Return the width that all examples of one micro-batch must share.

        Privacy: the width depends on the example alone. Some models react to padding; if a text
        were padded to the longest of its batch, one example could change the gradients of others,
        beyond the clip norm.
        """

    def full(self) -> int:
        """Return the number of texts at the maximal length, some of which were cut."""
        return 0

    def ordered(self, indices: Iterable[int]) -> list[int]:
        """Return the indices sorted by width, then by length."""
        return sorted(indices, key=lambda index: (self.width(index), self.length(index)))

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield every example once, sorted by length."""
        yield from self.micro_batches(range(len(self)), size)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[Batch]:
        """Yield the given examples in micro-batches of one width and at most ``size`` examples."""
        yield from (self.batch(part, width) for part, width in self.parts(indices, size))

    def parts(self, indices: Iterable[int], size: int) -> Iterator[tuple[list[int], int]]:
        """Yield the indices of each micro-batch with its width."""
        for width, alike in groupby(self.ordered(indices), key=self.width):
            part = list(alike)
            for start in range(0, len(part), size):
                yield part[start : start + size], width


def padded_width(length: int, longest: int, shortest: int = SHORTEST) -> int:
    """Return the padded length of a text in tokens: 8, 16, 32 and so on.

    Powers of two give few widths, and each width costs a micro-batch; ``shortest`` leaves out the
    small ones. Limit: ``longest``, which no text exceeds.
    """
    return min(max(1 << (length - 1).bit_length(), shortest), longest)


def _bytes_of(rows: Sequence[Sequence[int]]) -> int:
    return sum(_ROW_BYTES + _TOKEN_BYTES * len(row) for row in rows)


def _padded(rows: Sequence[Sequence[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """Return (examples, tokens) ids, padded on the right, and their mask."""
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad)
    ids = torch.nn.functional.pad(ids, (0, max(width - ids.shape[1], 0)), value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@dataclass(frozen=True)
class EncodedTexts(Encoded):
    """Texts for classification, as token ids.

    Attributes:
        tokens: token ids per text.
        labels: (examples,).
        pad: the id of the padding token.
        longest: the maximal number of tokens per text, set by the config and not by the data.
        shortest: the number of tokens to which a text is padded at least.
    """

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int
    longest: int = UNLIMITED
    shortest: int = SHORTEST

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.labels)

    def size_in_bytes(self) -> int:
        """Return the approximate number of bytes of memory."""
        return _bytes_of(self.tokens)

    def length(self, index: int) -> int:
        """Return a text's number of tokens."""
        return len(self.tokens[index])

    def full(self) -> int:
        """Return how many texts have ``longest`` tokens."""
        return sum(len(row) >= self.longest for row in self.tokens)

    def width(self, index: int) -> int:
        """Return the padded length of a text in tokens."""
        return padded_width(len(self.tokens[index]), self.longest, self.shortest)

    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given texts, padded to the longest of them and to at least ``width``."""
        ids, mask = _padded([self.tokens[i] for i in indices], self.pad, width)
        return Batch(ids, mask, torch.tensor([self.labels[i] for i in indices]))


@dataclass(frozen=True)
class EncodedSequences(Encoded):
    """Texts for a language model, which predicts each next token; one text is one example.

    Attributes:
        tokens: token ids per text.
        longest: the maximal number of tokens per text, set by the config and not by the data.
        shortest: the number of tokens to which a text is padded at least.
    """

    tokens: tuple[tuple[int, ...], ...]
    longest: int = UNLIMITED
    shortest: int = SHORTEST

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.tokens)

    def size_in_bytes(self) -> int:
        """Return the approximate number of bytes of memory."""
        return _bytes_of(self.tokens)

    def length(self, index: int) -> int:
        """Return a text's number of tokens."""
        return len(self.tokens[index])

    def full(self) -> int:
        """Return how many texts have ``longest`` tokens."""
        return sum(len(row) >= self.longest for row in self.tokens)

    def width(self, index: int) -> int:
        """Return the padded length of a text in tokens."""
        return padded_width(len(self.tokens[index]), self.longest, self.shortest)

    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given texts, padded on the right; causal attention ignores that side."""
        ids, mask = _padded([self.tokens[i] for i in indices], 0, width)
        return Batch(ids, None, ids.masked_fill(mask == 0, IGNORED))


@dataclass(frozen=True)
class EncodedImages(Encoded):
    """Images in their stored sizes; the model's device resizes them.

    Attributes:
        stacks: one tensor per stored size, (images, 3, height, width) uint8.
        labels: (examples,).
        places: (examples,), pairs of the stack's number and the row in the stack.
    """

    stacks: tuple[Tensor, ...]
    labels: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of_one_size(cls, pixels: Tensor, labels: tuple[int, ...]) -> "EncodedImages":
        """Return images that all have one size, in their order."""
        return cls((pixels,), labels, tuple((0, row) for row in range(len(labels))))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def size_in_bytes(self) -> int:
        """Return the approximate number of bytes of memory."""
        return sum(stack.nbytes for stack in self.stacks) + 3 * _ROW_BYTES * len(self)

    def width(self, index: int) -> int:
        """Return the number of the image's stack, which stands for its stored size."""
        return self.places[index][0]

    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given images, which must all be in one stack."""
        (stack,) = {self.places[i][0] for i in indices}
        rows = torch.tensor([self.places[i][1] for i in indices])
        labels = torch.tensor([self.labels[i] for i in indices])
        return Batch(self.stacks[stack][rows], None, labels)


_TEXTS = EncodedCache[EncodedTexts](CACHE_BYTES)
_SEQUENCES = EncodedCache[EncodedSequences](CACHE_BYTES)


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


def encode_texts(
    examples: Examples, tokenizer: Any, max_length: int, min_length: int = SHORTEST
) -> EncodedTexts:
    """Return texts to classify as token ids; kept for the next call of this process.

    Raises:
        DataError: if the examples are images, or a text has no token.
    """

    def encode() -> EncodedTexts:
        ids = _token_ids(examples, tokenizer, max_length)
        pad = tokenizer.pad_token_id
        return EncodedTexts(ids, examples.labels, pad, max_length, min_length)

    return _TEXTS.get((examples.fingerprint, tokenizer, max_length, min_length), encode)


def encode_sequences(
    examples: Examples, tokenizer: Any, max_length: int, min_length: int = SHORTEST
) -> EncodedSequences:
    """Return texts for a language model as token ids; kept for the next call of this process.

    Raises:
        DataError: if the examples are images, or a text has no token.
    """

    def encode() -> EncodedSequences:
        ids = _token_ids(examples, tokenizer, max_length)
        return EncodedSequences(ids, max_length, min_length)

    return _SEQUENCES.get((examples.fingerprint, tokenizer, max_length, min_length), encode)
