"""Test models of transformers: loaded as stock code loads them, or refused in one line."""

import shutil

import pytest
import torch

from conftest import WORDS, save_tokenizer
from helpers.model_checks import IMAGE_BATCH, damaged, normalised, pixels, refusal
from lalora_app.data.encoding import Batch
from lalora_app.models.backbone import build


def test_positions_of_roberta_begin_behind_the_padding(tiny, tmp_path):
    """16 positions, of which padding takes the first two: 14 tokens."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, pad_token_id=1, **sizes
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    name = {"model.name": str(tmp_path)}
    backbone, _ = build(tiny(**name, **{"model.max-length": 14}))
    ids = torch.full((1, 14), 5)
    assert backbone.logits(Batch(ids, torch.ones_like(ids), torch.zeros(1))).isfinite().all()
    line = refusal(tiny(**name, **{"model.max-length": 15}))
    assert line == "model.max-length=15 must be at most 14, the model's longest"


def test_pixels_are_normalised_as_the_folder_says(images, tiny_vit):
    from transformers import AutoModelForImageClassification

    config = images("hf-vit", **{"data.num-labels": 5})
    backbone, start = build(config)
    backbone.load(start)
    seen = normalised(pixels(3, 16), [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    model = AutoModelForImageClassification.from_pretrained(tiny_vit).eval()
    with torch.no_grad():
        found, theirs = backbone.logits(IMAGE_BATCH.batch([0, 1, 2])), model(seen).logits
    torch.testing.assert_close(found, theirs)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("Beit", "Dinov2", "DeiT")]


@pytest.mark.parametrize("architecture", ["ViT", "Swin", *SLOWER])
def test_every_image_encoder_of_transformers_has_its_targets(architecture, images, tmp_path):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    if architecture == "Swin":
        sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4}
        sizes |= {"depths": [1, 1], "num_heads": [1, 2]}
    torch.manual_seed(0)
    settings = getattr(transformers, f"{architecture}Config")(**sizes)
    getattr(transformers, f"{architecture}ForImageClassification")(settings).save_pretrained(
        tmp_path
    )
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    backbone, start = build(images(str(tmp_path)))
    assert backbone.targets == 4  # queries and values of two layers
    assert sum(".lora_A." in name for name in start) == 4


def test_an_image_size_that_is_not_the_models_is_one_line(images):
    for name in ("swin", "hf-vit"):
        line = refusal(images(name, **{"model.image-size": 32, "model.image-resize": 32}))
        assert line == "model.image-size=32 must be 16, the model's own"


DAMAGE = {
    "no weights": ("model.safetensors", None, "cannot be loaded"),
    "half of the weights": ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", "cannot be loaded"),
    "no config": ("config.json", None, "must be a folder with a config.json"),
    "half of the config": ("config.json", b"{", "cannot be loaded"),
    "an unknown model": ("config.json", b'{"model_type": "none"}', "cannot be loaded"),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_a_damaged_folder_is_one_line(case, tiny, tiny_model, tmp_path):
    file, content, words = DAMAGE[case]
    folder = damaged(tiny_model, tmp_path / "copy", file, content)
    line = refusal(tiny(**{"model.name": folder}))
    assert line.startswith(f'model.name="{folder}" {words}')


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_one_line(tiny, tiny_model, tmp_path):
    """Privacy: a text with such a token would end a round that others would not."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["secret"])
    tokenizer.save_pretrained(folder)
    line = refusal(tiny(**{"model.name": str(folder)}))
    rows = len(WORDS)
    assert line.endswith(f"token {rows} is outside its table of {rows} rows")


def test_a_folder_without_a_tokenizer_is_one_line(tiny, tiny_model, tmp_path):
    """transformers would make one up that knows no word."""
    shutil.copytree(tiny_model, tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    line = refusal(tiny(**{"model.name": str(tmp_path / "copy")}))
    assert line == f'model.name="{tmp_path / "copy"}" must come with a tokenizer'


def test_an_image_model_without_its_normalisation_is_one_line(images, tiny_vit, tmp_path):
    folder = damaged(tiny_vit, tmp_path / "copy", "preprocessor_config.json", None)
    assert "cannot be loaded" in refusal(images(folder))
    backbone, _ = build(images(folder, **{"model.weights": "random"}))
    seen = normalised(pixels(2, 16), [0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(backbone.forward.args[0](pixels(2, 16)), seen)


def test_a_model_of_another_task_is_one_line(images, texts, tiny_model, tiny_vit):
    assert "cannot be loaded" in refusal(images(tiny_model))
    assert "cannot be loaded" in refusal(texts("bert", **{"model.name": tiny_vit}))
