"""Models with layers that also see rows which belong to no example: DeBERTa's relative positions.

DeBERTa projects one embedding per relative position, and all examples use the result. Autograd
would return one gradient of that result, summed over the batch, and no example's own. So every
example is given its own set of these rows, equal in value: the gradient of a set is that of one
example's loss.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


class _Expanded:
    """A Linear layer that repeats its rows for every example.

    Args:
        layer: the layer.
        examples: number of examples in the batch.
    """

    def __init__(self, layer: nn.Module, examples: int):
        self._layer, self._examples = layer, examples

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (examples, rows, out) from (1, rows, in), as a copy: DeBERTa writes into it."""
        if _trains(self._layer):
            # stride 0: the kernels compute the output once, and record each example's gradient
            out = self._layer(rows.expand(self._examples, -1, -1))
        else:
            out = self._layer(rows).expand(self._examples, -1, -1)
        copied: Tensor = out.clone(memory_format=torch.contiguous_format)
        return copied


class _AttentionView:
    """An attention layer as its own method should see it: its Linear layers expand their rows.

    Args:
        attention: the attention layer.
        examples: number of examples in the batch.
    """

    def __init__(self, attention: Any, examples: int):
        self._attention, self._examples = attention, examples

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._attention, name)
        return _Expanded(value, self._examples) if isinstance(value, nn.Module) else value


class _FlatHeadsView(_AttentionView):
    """The view for DeBERTa-v2, whose states are (examples·heads, tokens, features).

    DeBERTa-v2 repeats the projected positions (first axis / heads) times. Here the rows are
    repeated before the projection, so ``num_attention_heads`` is the first axis, and the factor is
    1.

    Args:
        attention: the attention layer.
        states: (examples·heads, tokens, features).
    """

    def __init__(self, attention: Any, states: Tensor):
        self._heads: int = attention.num_attention_heads
        self.num_attention_heads = states.shape[0]
        super().__init__(attention, states.shape[0] // self._heads)

    def transpose_for_scores(self, rows: Tensor, _: int) -> Tensor:
        """Return (examples·heads, rows, features of a head)."""
        return self._attention.transpose_for_scores(rows, self._heads)  # type: ignore[no-any-return]


def _v1_bias(attention: Any, states: Tensor, *rest: Any) -> Tensor:
    view = _AttentionView(attention, states.shape[0])  # states: (examples, heads, tokens, features)
    return type(attention).disentangled_att_bias(view, states, *rest)  # type: ignore[no-any-return]


def _v2_bias(attention: Any, states: Tensor, *rest: Any) -> Tensor:
    view = _FlatHeadsView(attention, states)
    return type(attention).disentangled_attention_bias(view, states, *rest)  # type: ignore[no-any-return]


def expand_shared_rows(model: nn.Module) -> None:
    """Let DeBERTa's attention layers keep the relative positions of every example apart.

    The model's outputs stay the same. Other models are left alone: if one of their trained layers
    sees shared rows, the check of the layout refuses the model.

    Args:
        model: a transformers model, changed in place.
    """
    from transformers.models.deberta import modeling_deberta
    from transformers.models.deberta_v2 import modeling_deberta_v2

    layer: Any
    for layer in model.modules():
        if isinstance(layer, modeling_deberta.DisentangledSelfAttention):
            layer.disentangled_att_bias = MethodType(_v1_bias, layer)
        elif isinstance(layer, modeling_deberta_v2.DisentangledSelfAttention):
            layer.disentangled_attention_bias = MethodType(_v2_bias, layer)
