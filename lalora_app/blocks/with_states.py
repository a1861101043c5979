"""Encoded examples whose batches hold the input of the first adapted block."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lalora_app.blocks.kept_states import KeptStates
from lalora_app.blocks.prefix import Prefix
from lalora_app.data.encoding import Batch, Encoded, Indices

STATES_DTYPE = torch.bfloat16  # it has the range of float32: residual streams exceed float16


def size_of(data: Encoded, prefix: Prefix, index: int, dtype: torch.dtype = STATES_DTYPE) -> int:
    """Return the number of bytes of one example's states."""
    return (data.length(index) or prefix.tokens) * prefix.features * dtype.itemsize


@dataclass(frozen=True)
class WithStates(Encoded):
    """Encoded examples whose batches hold the hidden states of the frozen blocks below.

    States that are not kept are computed when an example is first drawn. Kept and new states are
    rounded alike, so that an example's gradient does not depend on what is kept.

    Privacy: states depend on their own example alone, and are padded by zeros.

    Attributes:
        data: the encoded examples.
        prefix: the blocks below the first adapted one.
        compute: batch -> (examples, tokens, features), their output.
        kept: the place of the states.
        dtype: the number type of kept states.
    """

    data: Encoded
    prefix: Prefix
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
        batch = self.data.batch(indices, width)
        keys = [self._key(batch.inputs[row], int(i)) for row, i in enumerate(indices)]
        entries = [self.kept.read(int(i), key) for i, key in zip(indices, keys, strict=True)]
        missing = [row for row, entry in enumerate(entries) if entry is None]
        if missing:
            fresh = self._computed([int(indices[row]) for row in missing], width)
            for row, entry in zip(missing, fresh, strict=True):
                self.kept.write(int(indices[row]), keys[row], entry)
                entries[row] = entry
        tokens = batch.inputs.shape[1] if batch.inputs.dim() == 2 else self.prefix.tokens
        return replace(batch, states=self._padded([e for e in entries if e is not None], tokens))

    def _key(self, inputs: Tensor, index: int) -> bytes:
        """Return the SHA-256 of the model below and of an example's inputs without padding."""
        own = inputs[: self.data.length(index)] if inputs.dim() == 1 else inputs
        what = f"{self.prefix.fingerprint} {self.dtype} {own.dtype} {tuple(own.shape)}\0".encode()
        return hashlib.sha256(what + own.contiguous().numpy().tobytes()).digest()

    def _computed(self, indices: list[int], width: int) -> list[bytes]:
        """Return the rounded states of examples, without padding."""
        states = self.compute(self.data.batch(indices, width)).to(self.dtype).cpu()
        lengths = [self.data.length(index) or states.shape[1] for index in indices]
        rows = zip(states, lengths, strict=True)
        return [row[:n].contiguous().view(torch.uint8).numpy().tobytes() for row, n in rows]

    def _padded(self, entries: list[bytes], tokens: int) -> Tensor:
        """Return (examples, tokens, features), zero behind each example's own tokens."""
        states = torch.zeros(len(entries), tokens, self.prefix.features, dtype=self.dtype)
        for row, entry in zip(states, entries, strict=True):
            own = torch.frombuffer(bytearray(entry), dtype=self.dtype)
            row.view(-1)[: len(own)] = own
        return states
