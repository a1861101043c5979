"""The blocks below the first adapted one: compute their output, or start a pass from a kept one.

These blocks are frozen, so their output for one example is always the same. Privacy: it is as
private as the example, and stays at the client.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lalora_app.blocks.stack import hidden_states


class Prefix:
    """The blocks below the first adapted one.

    The forward functions of all blocks are replaced in place. In an ordinary pass they compute as
    before.

    Args:
        blocks: all blocks of the model, in the order of their computation.
        first: the number of the first adapted block, at least 1.
        identity: a text that changes whenever the output of these blocks may change.

    Attributes:
        fingerprint: the SHA-256 of ``identity`` and ``first``.
        shape: (tokens, features) of the last states that :meth:`states` has computed.
        dtype: their number type.
    """

    def __init__(self, blocks: Sequence[nn.Module], first: int, identity: str):
        text = json.dumps([identity, first])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.shape, self.dtype = torch.Size((0, 0)), torch.float32
        self._first = first
        self._given: Tensor | None = None
        self._watches = False
        self._seen: Tensor | None = None
        self._entries = 0  # of a block's output; 0: it is a tensor and no tuple
        for index, block in enumerate(blocks):
            cast(Any, block).forward = self._forward(index, block.forward)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the last states."""
        return self.shape[0]

    @property
    def features(self) -> int:
        """Return the width of the model at these states."""
        return self.shape[1]

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

    def states(self, run: Callable[[], object]) -> Tensor:
        """Return (examples, tokens, features): the input of the first adapted block.

        The adapted block and those above it are left out.

        Args:
            run: runs one forward pass of the model.
        """
        self._watches = True
        try:
            run()
        finally:
            self._watches = False
        states, self._seen = cast(Tensor, self._seen), None
        self.shape, self.dtype = states.shape[1:], states.dtype
        return states

    @contextmanager
    def starting_from(self, states: Tensor | None) -> Iterator[None]:
        """Let passes within the block begin at the first adapted block; None: as usual.

        Args:
            states: (examples, tokens, features), in the order of the pass's inputs.
        """
        self._given = None if states is None else states.to(self.dtype)
        try:
            yield
        finally:
            self._given = None
