"""Layers that also see rows which belong to no example: DeBERTa's relative positions."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import WORDS
from helpers.architectures import text_model
from helpers.oracle import (
    WAYS,
    assert_engine_is_right,
    loop_gradients,
    make_engine,
    randomise,
    trained,
)
from lalora_app.data.encoding import EncodedTexts
from lalora_app.private_step import kernels
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.layout_check import check_layout
from lalora_app.private_step.shared_rows import expand_shared_rows

# The layers that see the relative positions, with others beside them.
POSITIONS = {
    "deberta": ["in_proj", "pos_proj", "pos_q_proj", "dense"],
    "deberta-v2": ["query_proj", "value_proj", "pos_key_proj", "pos_query_proj"],
    "deberta-v3": ["query_proj", "key_proj", "value_proj", "dense"],
}
KINDS = sorted(POSITIONS)
SHARED_ROWS = 8  # of the tiny DeBERTa-v3: 2 x 4 buckets
LENGTHS = (3, 8, 5, 12, 4, 6, 7, 9)


def texts() -> EncodedTexts:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, len(WORDS), (n,), generator=generator).tolist() for n in LENGTHS]
    return EncodedTexts(tuple(map(tuple, tokens)), (0, 1) * 4, pad=0)


TEXTS = texts()


def losses(model: nn.Module, indices: list[int]) -> Tensor:
    batch = TEXTS.batch(indices)  # padded to the longest; a single text has no padding
    logits = model(input_ids=batch.inputs, attention_mask=batch.mask).logits
    return nn.functional.cross_entropy(logits, batch.labels, reduction="none")


def stock(kind: str, rank: int = 2) -> nn.Module:
    """PEFT's model of the stock DeBERTa, with random factors in float64."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="SEQ_CLS", r=rank, target_modules=POSITIONS[kind])
    return randomise(get_peft_model(text_model(kind), settings))


def expanded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    expand_shared_rows(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_the_stock_model(kind):
    model = stock(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            losses(expanded(model), [0, 1, 2]), losses(model, [0, 1, 2]), rtol=1e-12, atol=1e-12
        )


# 2, 4 and 8 examples divide the 8 shared rows; 3 and 5 do not
SIZES = [("B", 2), ("A", 4), ("AB", 3), ("AB", 8), ("A", 1), ("B", 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_stock_model_on_one_example_at_a_time(kind):
    assert_engine_is_right(
        stock(kind), losses, examples=8, phases=SIZES, prepare=expand_shared_rows
    )


def test_the_least_rank():
    model = stock("deberta-v3", rank=1)
    assert_engine_is_right(model, losses, phases=[("AB", 4)], prepare=expand_shared_rows)


def test_a_shared_row_matters():
    """Without the positions the gradient would be another: the comparison is no formality."""
    model = stock("deberta-v3")
    whole = loop_gradients(model, losses, [0, 1])
    with torch.no_grad():
        model.base_model.model.deberta.encoder.rel_embeddings.weight.zero_()
        model.base_model.model.deberta.encoder.LayerNorm.bias.zero_()
    fewer = loop_gradients(model, losses, [0, 1])
    name = next(n for n in whole if "key_proj.lora_A" in n)
    assert (whole[name] - fewer[name]).norm() > 0.01 * whole[name].norm()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("kernel", "flat"), WAYS)
def test_rows_that_are_not_expanded_are_refused_also_where_they_divide(size, kernel, flat):
    """The 8 shared rows divide into as many examples, and belong to none of them."""
    assert SHARED_ROWS % size == 0
    model = stock("deberta-v3")
    engine = make_engine(model, kernel, flat=flat)
    with pytest.raises(LayoutError, match=rf"\(1, {SHARED_ROWS}\) do not divide into {size} exam"):
        engine.gradients(lambda: losses(model, list(range(size))), size)


@pytest.mark.parametrize("kernel", ["fused", "merged"])
def test_equal_rows_are_computed_once(kernel, monkeypatch):
    model = expanded(stock("deberta-v3"))
    engine = KernelEngine(model, trained(model), kernel)
    seen, linear = [], nn.functional.linear

    def watched(x: Tensor, *rest: Tensor) -> Tensor:
        seen.append(tuple(x.shape[:-1]))
        return linear(x, *rest)

    monkeypatch.setattr(kernels.F, "linear", watched)
    engine.gradients(lambda: losses(model, [0, 2, 4]), 3)  # texts of at most 5 tokens
    assert (1, SHARED_ROWS) in seen
    assert (3, SHARED_ROWS) not in seen


# The check of the layout.


class Shared(nn.Module):
    """A model whose trained layer also sees rows of no example, as ``shape`` says."""

    def __init__(self, *shape: int):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("rows", torch.randn(*shape, 6, generator=generator))
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.layer(self.rows).reshape(-1, 6)
        weights = torch.softmax(self.layer(x) @ positions.T, -1)  # (examples, tokens, rows)
        return self.head((weights @ positions).mean(1))


def checked(model: nn.Module) -> None:
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=generator)
    x[:, 0, 0] = torch.arange(3)
    labels = torch.tensor([0, 1, 2])

    def of(rows: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(x[rows]), labels[rows], reduction="none")

    check_layout(KernelEngine(model, trained(model)), of, 3)


@pytest.mark.parametrize("shape", [(1, 6), (6,), (3, 2), (2, 3), (1, 7), (12,), (6, 1)])
def test_the_check_finds_shared_rows_of_every_shape(shape):
    """Six rows divide into two and into three examples, whatever their shape."""
    with pytest.raises(LayoutError, match=r"layer\.(weight|bias): "):
        checked(Shared(*shape))


class OwnThird(Shared):
    """Every example uses two of the six shared rows, its own; its first entry says which."""

    def forward(self, x: Tensor) -> Tensor:
        positions = self.layer(self.rows)  # (6, 6)
        mine = 2 * x[:, 0, 0].long()
        return self.head(self.layer(x).mean(1) + positions[mine] * positions[mine + 1])


def test_the_check_finds_rows_that_are_grouped_for_one_number_of_examples_only():
    with pytest.raises(LayoutError):
        checked(OwnThird(6))
