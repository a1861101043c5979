"""Test models of timm: loaded as stock code loads them, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, make_config, timm_class
from helpers.model_checks import IMAGE_BATCH, IMAGES, bare, damaged, normalised, pixels, refusal
from lalora_app.models.backbone import build

SWIN_32 = SHARED / "models" / "swin-small-32"
DINO = SHARED / "models" / "dinov2-vit-s14-saliency"


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_a_folder_of_a_class_is_what_timm_makes_of_it(kind, images, tiny_timm):
    backbone, start = build(images(kind))
    backbone.load(start)
    model = timm_class(kind, num_classes=2).eval()
    weights = load_file(Path(tiny_timm[kind]) / "model.safetensors")
    left = model.load_state_dict(weights, strict=False)
    assert left.unexpected_keys == []
    assert all(name.startswith("head") for name in left.missing_keys)
    seen = normalised(pixels(3, 16), [0.4] * 3, [0.2] * 3)
    with torch.no_grad():
        found = bare(backbone).forward_features(seen)
        torch.testing.assert_close(found, model.forward_features(seen))
        head = {n.rpartition(".")[2]: torch.from_numpy(a) for n, a in start.items() if "head" in n}
        model.get_classifier().load_state_dict(head)
        torch.testing.assert_close(backbone.logits(IMAGE_BATCH.batch([0, 1, 2])), model(seen))


@pytest.mark.slow
@pytest.mark.skipif(not SWIN_32.is_dir(), reason=f"needs the Swin of {SWIN_32}")
def test_the_shared_swin_is_loaded_as_its_readme_says():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"model.image-size": 32, "model.image-resize": 32, "data.num-labels": 20}
    backbone, _ = build(make_config(**IMAGES, **sizes, **{"model.name": f"timm:{SWIN_32}"}))
    settings = json.loads((SWIN_32 / "config.json").read_text("utf-8"))
    model = SwinTransformer(**settings["kwargs"], num_classes=20).eval()
    weights = load_file(SWIN_32 / "model.safetensors")
    model.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    seen = normalised(pixels(2, 32), settings["mean"], settings["std"])
    with torch.no_grad():
        theirs = model.forward_features(seen)
        torch.testing.assert_close(bare(backbone).forward_features(seen), theirs)
    assert backbone.targets == 20
    found = backbone.forward.args[0](pixels(2, 32))  # as the model sees them
    torch.testing.assert_close(found, seen)


@pytest.mark.slow
@pytest.mark.skipif(not DINO.is_dir(), reason=f"needs the ViT of {DINO}")
def test_the_shared_vit_is_loaded_as_its_readme_says():
    import timm

    sizes = {"model.image-size": 112, "model.image-resize": 128, "data.num-labels": 7}
    backbone, _ = build(make_config(**IMAGES, **sizes, **{"model.name": f"timm:{DINO}"}))
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(DINO / "model.safetensors")},
        img_size=112,
        num_classes=7,
    ).eval()
    known = json.loads((DINO / "config.json").read_text("utf-8"))["pretrained_cfg"]
    seen = normalised(pixels(1, 112), known["mean"], known["std"])
    with torch.no_grad():
        theirs = model.forward_features(seen)
        torch.testing.assert_close(bare(backbone).forward_features(seen), theirs)
    torch.testing.assert_close(backbone.forward.args[0](pixels(1, 112)), seen)


def test_a_folder_of_an_architecture_has_its_own_normalisation(images, tmp_path):
    import timm

    name = "test_vit"
    torch.manual_seed(3)
    theirs = timm.create_model(name, img_size=16, num_classes=0)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    settings = {"architecture": name, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    backbone, _ = build(images(f"timm:{tmp_path}"))
    seen = normalised(pixels(2, 16), [0.1, 0.2, 0.3], [0.4] * 3)
    torch.testing.assert_close(backbone.forward.args[0](pixels(2, 16)), seen)
    with torch.no_grad():
        found = bare(backbone).forward_features(seen)
        torch.testing.assert_close(found, theirs.eval().forward_features(seen))


def test_random_weights_need_no_file_and_follow_the_seed(images):
    def weights(seed, tag=""):
        name = f"timm:test_vit{tag}"
        backbone, _ = build(images(name, seed=seed, **{"model.weights": "random"}))
        return bare(backbone).blocks[0].mlp.fc1.weight

    first = weights(0)
    assert first.std() > 0
    assert torch.equal(first, weights(0, ".r160_in1k"))  # which weights, were they wanted
    assert not torch.equal(first, weights(1))


def test_random_weights_of_a_folder(images, tiny_timm, tmp_path):
    shutil.copy(Path(tiny_timm["swin"]) / "config.json", tmp_path)
    name = f"timm:{tmp_path}"
    assert "cannot be loaded" in refusal(images(name))
    backbone, _ = build(images(name, **{"model.weights": "random"}))
    assert backbone.logits(IMAGE_BATCH.batch([0])).shape == (1, 2)


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_timm_has_no_text_models(task, tiny_timm, tiny):
    line = refusal(tiny(**{"model.name": f"timm:{tiny_timm['vit']}", "model.task": task}))
    assert line == f'model.task="{task}" must be "image-classification" for timm'


TIMM_NAMES = {
    "a misspelt name": ("swin_tinny_patch4", "must be an architecture of timm: swin"),
    "no name": ("", "must be an architecture of timm"),
    "no folder": ("/no/such/folder", "must be a folder with a config.json"),
    "two heads": ("deit_tiny_distilled_patch16_224", "must have one Linear layer as its head"),
    "convolutions only": ("resnet10t", "must have Linear layers outside its head: LoRA trains no"),
    "convolutions in its MLPs": ("test_efficientnet", "ViT, Swin and ConvNeXt have such layers"),
}


@pytest.mark.parametrize("case", list(TIMM_NAMES))
def test_what_timm_does_not_have_is_one_line(case, images):
    name, words = TIMM_NAMES[case]
    line = refusal(images(f"timm:{name}", **{"model.weights": "random"}))
    assert line.startswith(f'model.name="timm:{name}" ')
    assert words in line


SETTINGS = {
    "no kind": ({"mean": [0.5] * 3}, 'must have "architecture", or a timm "class"'),
    "any code": ({"class": "os.system", "kwargs": {}}, "must be a class of timm.models"),
    "any code beside": ({"class": "timm.modelsX.y.Z", "kwargs": {}}, "class of timm.models"),
    "no arguments": ({"class": "timm.models.vision_transformer.VisionTransformer"}, "kwargs"),
    "no such class": ({"class": "timm.models.vision_transformer.Nope", "kwargs": {}}, "Nope"),
}


@pytest.mark.parametrize("case", list(SETTINGS))
def test_a_folder_that_describes_no_model_is_one_line(case, images, tmp_path):
    settings, words = SETTINGS[case]
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    assert words in refusal(images(f"timm:{tmp_path}", **{"model.weights": "random"}))


def test_a_damaged_config_of_timm_is_one_line(images, tmp_path):
    (tmp_path / "config.json").write_text("{", "utf-8")
    assert f'model.name="timm:{tmp_path}"' in refusal(images(f"timm:{tmp_path}"))


def test_a_checkpoint_that_lacks_more_than_the_head_is_one_line(images, tiny_timm, tmp_path):
    source = Path(tiny_timm["swin"])
    shutil.copy(source / "config.json", tmp_path)
    weights = load_file(source / "model.safetensors")
    del weights["layers.0.blocks.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    line = refusal(images(f"timm:{tmp_path}"))
    assert line == (
        f'model.name="timm:{tmp_path}" must have weights for layers.0.blocks.1.mlp.fc1.weight'
    )


def test_damaged_weights_of_timm_are_one_line(images, tiny_timm, tmp_path):
    folder = damaged(tiny_timm["vit"], tmp_path / "copy", "model.safetensors", b"12345678")
    assert "cannot be loaded" in refusal(images(f"timm:{folder}"))
