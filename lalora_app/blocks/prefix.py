"""The frozen part of a model: compute its output, or start a pass from a kept one.

The part is frozen, so its output for one example is always the same. Privacy: it is as private as
the example, and stays at the client.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lalora_app.blocks.stack import hidden_states


class FrozenPart(ABC):
    """The lower part of a model, which a pass can leave out if its output is kept.

    Args:
        identity: a text that changes whenever the output of this part may change.
        end: the name of its end in the model.

    Attributes:
        fingerprint: the SHA-256 of ``identity`` and ``end``.
        shape: (tokens, features) of the last states that :meth:`states` has computed.
        dtype: their number type.
        per_token: whether the states have one row for each token of the input.
    """

    def __init__(self, identity: str, end: int | str):
        text = json.dumps([identity, end])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.shape, self.dtype = torch.Size((0, 0)), torch.float32
        self.per_token = True

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the last states."""
        return self.shape[0]

    @property
    def features(self) -> int:
        """Return the width of the model at these states."""
        return self.shape[1]

    def states(self, run: Callable[[], object]) -> Tensor:
        """Return (examples, tokens, features): the output of this part.

        Args:
            run: runs one forward pass of the model.
        """
        states = self._states(run)
        self.shape, self.dtype = states.shape[1:], states.dtype
        return states

    @contextmanager
    def starting_from(self, states: Tensor | None) -> Iterator[None]:
        """Let passes within the block leave this part out; None: as usual.

        Args:
            states: (examples, tokens, features), in the order of the pass's inputs.
        """
        self._give(None if states is None else states.to(self.dtype))
        try:
            yield
        finally:
            self._give(None)

    @abstractmethod
    def _states(self, run: Callable[[], object]) -> Tensor:
        """Return (examples, tokens, features): the output of this part."""

    @abstractmethod
    def _give(self, states: Tensor | None) -> None:
        """Let passes start from these states; None: from their inputs."""


class Prefix(FrozenPart):
    """The blocks below the first adapted one.

    The forward functions of all blocks are replaced in place. In an ordinary pass they compute as
    before.

    Args:
        blocks: all blocks of the model, in the order of their computation.
        first: the number of the first adapted block, at least 1.
        identity: a text that changes whenever the output of these blocks may change.
    """

    def __init__(self, blocks: Sequence[nn.Module], first: int, identity: str):
        super().__init__(identity, first)
        self._first = first
        self._given: Tensor | None = None
        self._watches = False
        self._seen: Tensor | None = None
        self._entries = 0  # of a block's output; 0: it is a tensor and no tuple
        for index, block in enumerate(blocks):
            cast(Any, block).forward = self._forward(index, block.forward)

    def _forward(self, index: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            if self._given is not None and index < self._first:
                return self._as_output(self._given)
            if self._watches and index >= self._first:
                states = cast(Tensor, hidden_states(arguments, named))
                self._seen = states if index == self._first else self._seen
                return self._as_output(states)
            output = plain(*arguments, **named)
            self._entries = len(output) if isinstance(output, tuple) else 0
            return output

        return forward

    def _as_output(self, states: Tensor) -> Any:
        """Return states as a block returns them; what else it returns is not used in training."""
        return (states, *([None] * (self._entries - 1))) if self._entries else states

    def _states(self, run: Callable[[], object]) -> Tensor:
        """Return the input of the first adapted block; it and the blocks above are left out."""
        self._watches = True
        try:
            run()
        finally:
            self._watches = False
        states, self._seen = cast(Tensor, self._seen), None
        return states

    def _give(self, states: Tensor | None) -> None:
        self._given = states
