"""Encoded examples whose batches hold the output of the model's frozen part."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lalora_app.blocks.kept_states import KeptStates
from lalora_app.blocks.prefix import FrozenPart
from lalora_app.data.encoding import Batch, Encoded, Indices

STATES_DTYPE = torch.bfloat16  # it has the range of float32: residual streams exceed float16


def _rows(data: Encoded, part: FrozenPart, index: int) -> int:
    """Return the number of rows of one example's states, without padding."""
    return (part.per_token and data.length(index)) or part.tokens


def size_of(data: Encoded, part: FrozenPart, index: int, dtype: torch.dtype = STATES_DTYPE) -> int:
    """Return the number of bytes of one example's states."""
    return _rows(data, part, index) * part.features * dtype.itemsize


@dataclass(frozen=True)
class WithStates(Encoded):
    """Encoded examples whose batches hold the output of the model's frozen part.

    States that are not kept are computed when an example is first drawn. Kept and new states are
    rounded alike, so that an example's gradient does not depend on what is kept.

    Privacy: states depend on their own example alone, and are padded by zeros.

    Attributes:
        data: the encoded examples.
        prefix: the frozen part of the model.
        compute: batch -> (examples, tokens, features), their output.
        kept: the place of the states.
        dtype: the number type of kept states.
    """

    data: Encoded
    prefix: FrozenPart
    compute: Callable[[Batch], Tensor]
    kept: KeptStates
    dtype: torch.dtype = STATES_DTYPE

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.data)

    def length(self, index: int) -> int:
        """Return the length of an example as its data says it."""
        return self.data.length(index)

    def width(self, index: int) -> int:
        """Return the width that all examples of one micro-batch share."""
        return self.data.width(index)

    def full(self) -> int:
        """Return the number of texts at the maximal length."""
        return self.data.full()

    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given examples with their states, padded as the inputs are."""
        batch, places = self.data.batch(indices, width), [int(index) for index in indices]
        keys = self._keys(batch.inputs.numpy(), places)
        found = [self.kept.read(index, key) for index, key in zip(places, keys, strict=True)]
        missing = [row for row, states in enumerate(found) if states is None]
        if missing:
            fresh = self._computed([places[row] for row in missing], width)
            for row, states in zip(missing, fresh, strict=True):
                self.kept.write(places[row], keys[row], states)
                found[row] = states
        of_input = self.prefix.per_token and batch.inputs.dim() == 2
        tokens = batch.inputs.shape[1] if of_input else self.prefix.tokens
        return replace(batch, states=self._padded([s for s in found if s is not None], tokens))

    def _keys(self, inputs: np.ndarray, indices: list[int]) -> list[bytes]:
        """Return the SHA-256 of the frozen part and of each input without its padding."""
        kind = f"{self.prefix.fingerprint} {self.dtype} {inputs.dtype} {inputs.shape[2:]}\0"
        below = hashlib.sha256(kind.encode())
        keys = []
        for row, index in zip(inputs, indices, strict=True):
            key = below.copy()
            key.update(row[: self.data.length(index) or None].tobytes())
            keys.append(key.digest())
        return keys

    def _computed(self, indices: list[int], width: int) -> list[bytes]:
        """Return the rounded states of examples, without padding."""
        states = self.compute(self.data.batch(indices, width)).to(self.dtype).cpu()
        lengths = [_rows(self.data, self.prefix, index) for index in indices]
        rows = zip(states, lengths, strict=True)
        return [row[:n].contiguous().view(torch.uint8).numpy().tobytes() for row, n in rows]

    def _padded(self, found: list[bytes], tokens: int) -> Tensor:
        """Return (examples, tokens, features), zero behind each example's own tokens."""
        flat = torch.frombuffer(bytearray(b"".join(found)), dtype=self.dtype)
        rows = flat.view(-1, self.prefix.features)  # (tokens of all examples, features)
        sizes = [len(states) // self.dtype.itemsize // rows.shape[1] for states in found]
        states = pad_sequence(list(torch.split(rows, sizes)), batch_first=True)
        return pad(states, (0, 0, 0, tokens - states.shape[1]))
