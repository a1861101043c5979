"""Pairs of texts: BERT and its kin are told which text a token is of, as their tokenizer says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, save_tokenizer
from lalora_app.data.examples import Examples
from lalora_app.models.backbone import build
from lalora_app.models.forwards import Segmented, segments

PAIRS = (("free prize", "call now"), ("ok", "hello dear friend see you"), ("see you", "ok"))
TEXT = st.lists(st.sampled_from(WORDS[5:]), min_size=1, max_size=12).map(" ".join)


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@given(pair=st.tuples(TEXT, TEXT), longest=st.integers(4, 16), single=st.booleans())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_segments_are_the_tokenizers_own(tokenizer, pair, longest, single):
    told = tokenizer(*pair[: 1 if single else 2], truncation=True, max_length=longest)
    found = segments(torch.tensor([told["input_ids"]]), tokenizer.sep_token_id)
    assert found.tolist() == [told["token_type_ids"]]


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_a_pair_is_classified_as_the_stock_model_does(tiny, tokenizer, pooling):
    backbone, _ = build(tiny(**{"model.pooling": pooling, "data.input-column": "text,other"}))
    with torch.no_grad():  # fresh weights are so small that segments hardly count
        for weight in backbone.model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    backbone.model.double()  # such weights multiply the rounding of float32 too
    batch = backbone.encode(Examples(PAIRS, (0, 1, 0))).batch([0, 1, 2], 12)
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    tokens = tokenizer(firsts, seconds, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = backbone.logits(batch)
        expected = backbone.model(**tokens).logits
        blind = backbone.model(**tokens | {"token_type_ids": None}).logits
    if pooling == "mean":
        seen = tokens["attention_mask"][..., None]
        expected, blind = ((out * seen).sum(1) / seen.sum(1) for out in (expected, blind))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)  # logits are float32
    assert (found - blind).abs().max() > 0.01  # segments are no decoration


def bert(folder, **changes) -> str:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    sizes |= {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(**sizes | changes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({}, {}, True),
        ({"type_vocab_size": 1}, {}, False),
        ({}, {"model_input_names": ["input_ids", "attention_mask"]}, False),
    ],
    ids=["both", "a model without segments", "a tokenizer without segments"],
)
def test_segments_are_told_where_model_and_tokenizer_know_them(
    tiny, tmp_path, changes, options, told
):
    folder = bert(tmp_path / "bert", **changes)
    save_tokenizer(tmp_path / "bert", **options)
    backbone, _ = build(tiny(**{"model.name": folder}))
    assert isinstance(backbone.forward, Segmented) == told
    batch = backbone.encode(Examples(PAIRS, (0, 1, 0))).batch([0, 1, 2])
    assert torch.isfinite(backbone.logits(batch)).all()


def test_a_rule_that_is_not_berts_is_not_followed(tiny, monkeypatch):
    from transformers import BertTokenizerFast

    plain = BertTokenizerFast.__call__

    def other(self, *texts, **options):
        told = plain(self, *texts, **options)
        told["token_type_ids"] = [2, *told["token_type_ids"][1:]]  # a first token of its own
        return told

    monkeypatch.setattr(BertTokenizerFast, "__call__", other)
    backbone, _ = build(tiny(**{"model.pooling": "mean"}))
    assert not isinstance(backbone.forward, Segmented)
