"""Test heads and the tensors that a checkpoint lacks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import WORDS, save_tokenizer
from helpers.model_checks import IMAGE_BATCH, TEXT_BATCH, bare, randomised, stock
from lalora_app.models.backbone import build


@pytest.mark.parametrize(("kind", "head"), [("hf-vit", "classifier"), ("swin", "head.fc")])
def test_a_head_of_another_number_of_labels_is_made_anew(kind, head, images):
    for labels in (2, 3):
        backbone, start = build(images(kind, **{"data.num-labels": labels}))
        found = {n.split("model.", 2)[-1]: a.shape for n, a in start.items() if ".lora_" not in n}
        width = 16
        assert found == {f"{head}.weight": (labels, width), f"{head}.bias": (labels,)}
        assert backbone.logits(IMAGE_BATCH.batch([0, 1])).shape == (2, labels)


def test_all_but_the_head_is_the_checkpoints(images, tiny_vit):
    backbone, _ = build(images("hf-vit", **{"data.num-labels": 3}))
    found = {n.replace(".base_layer", ""): p for n, p in bare(backbone).named_parameters()}
    saved = dict(stock("hf-vit", tiny_vit).named_parameters())
    kept = [name for name in saved if "classifier" not in name]
    assert len(kept) > 20
    assert all(torch.equal(found[name], saved[name]) for name in kept)


def test_a_head_that_fits_is_the_checkpoints(images, tiny_vit):
    _, start = build(images("hf-vit", **{"data.num-labels": 5}))
    saved = load_file(Path(tiny_vit) / "model.safetensors")
    for part in ("weight", "bias"):
        found = start[f"base_model.model.classifier.{part}"]
        assert np.array_equal(found, saved[f"classifier.{part}"].numpy())


def test_a_fresh_head_follows_the_seed(images):
    def head(seed):
        start = build(images("swin", seed=seed))[1]
        return start["base_model.model.head.fc.weight"]

    assert np.array_equal(head(0), head(0))
    assert not np.array_equal(head(0), head(1))


@pytest.fixture
def without_pooler(tmp_path) -> str:
    """A BERT that was saved without its pooler, as many sentence encoders are."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.mark.parametrize("targets", ["auto", "query,dense"])
def test_what_a_checkpoint_does_not_have_is_trained_and_saved(
    targets, without_pooler, tiny, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = tiny(**{"model.name": without_pooler, "lora.targets": targets})
    backbone, start = build(config)
    whole = {name for name in start if ".lora_" not in name}
    parts = ("bert.pooler.dense", "classifier")
    assert whole == {f"base_model.model.{p}.{w}" for p in parts for w in ("weight", "bias")}
    assert not any("pooler" in name for name in set(start) - whole)

    backbone = randomised(config)
    backbone.model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)  # the stock model's own pooler and head are others
    base = AutoModelForSequenceClassification.from_pretrained(without_pooler, num_labels=2)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = TEXT_BATCH.batch([0, 1, 2])
    with torch.no_grad():
        theirs = reloaded(input_ids=batch.inputs, attention_mask=batch.mask).logits
        torch.testing.assert_close(backbone.logits(batch), theirs)


def test_a_pooled_mean_needs_no_pooler(without_pooler, tiny):
    _, start = build(tiny(**{"model.name": without_pooler, "model.pooling": "mean"}))
    assert {n for n in start if ".lora_" not in n} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
