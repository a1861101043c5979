"""The adapter's folder as a model of transformers: what it refuses, and what it can be saved as."""

import json
import shutil

import pytest
import torch

from helpers.exported import CLASSES, NAMES, exported, logits_of, random_texts, tokens_of

pytestmark = pytest.mark.usefixtures("code_of_models")
TEXTS = random_texts()
MEAN = {"model.pooling": "mean"}
TRUST = {"trust_remote_code": True}


def test_what_is_loaded_from_an_adapter_can_be_saved_whole(tiny, tmp_path):
    """Without the base model and without PEFT's files."""
    from transformers import AutoModelForSequenceClassification

    done = exported(tiny(**MEAN | CLASSES), tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(done.adapter, **TRUST)
    loaded.save_pretrained(tmp_path / "whole")
    shutil.copy(done.adapter / "exported_classifier.py", tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", **TRUST)
    found = logits_of(again, tokens_of(done.adapter, TEXTS))
    torch.testing.assert_close(found, done.logits(TEXTS), rtol=1e-4, atol=1e-5)


def test_the_code_takes_the_type_of_numbers_that_its_user_asks_for(tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification

    done = exported(tiny(**MEAN | CLASSES), tmp_path)
    for folder in (done.adapter, done.merged):
        options = TRUST | {"dtype": torch.bfloat16}
        narrow = AutoModelForSequenceClassification.from_pretrained(folder, **options)
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
        found = logits_of(narrow, tokens_of(folder, TEXTS)).float()
        expected = done.logits(TEXTS)
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_an_adapter_on_random_weights_is_refused_and_merged(pooling, tiny, tmp_path):
    """Their values are nowhere but in the run, so no folder or id names them."""
    import transformers

    keys = {"model.weights": "random", "model.pooling": pooling}
    done = exported(tiny(**keys | CLASSES), tmp_path)
    for trust in (True, False):
        with pytest.raises(ValueError, match="model type `lalora_run`"):
            transformers.pipeline(
                "text-classification", model=str(done.adapter), trust_remote_code=trust
            )
    settings = json.loads((done.adapter / "adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] is None
    assert "exported_classifier" not in (done.adapter / "config.json").read_text("utf-8")
    assert not (done.adapter / "exported_classifier.py").exists()
    card = (done.adapter / "README.md").read_text("utf-8")
    assert "The base model's weights were random" in card
    assert "```python" not in card
    model = done.load_merged()
    found = logits_of(model, tokens_of(done.merged, TEXTS))
    torch.testing.assert_close(found, done.logits(TEXTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_long_texts_are_cut_by_the_adapters_pipeline(pooling, tiny, tmp_path):
    from transformers import pipeline

    done = exported(tiny(**{"model.pooling": pooling} | CLASSES), tmp_path)
    classify = pipeline("text-classification", model=str(done.adapter), **TRUST)
    long = " ".join(["free", "call", "now", "ok"] * 20)  # the model has 16 positions
    (found,) = classify([long], top_k=3)
    likely = done.logits([long]).softmax(1)[0].tolist()
    scores = {entry["label"]: entry["score"] for entry in found}
    assert scores == pytest.approx(dict(zip(NAMES, likely, strict=True)), abs=1e-5)
    assert classify.tokenizer.model_max_length == done.config.model.max_length
