"""Base models: loaded as stock code loads them, trained right, and refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import SHARED, WORDS, make_config, save_tokenizer, timm_class
from helpers.app_runs import do_not_wait_for_nodes
from helpers.fake_grid import FakeGrid
from helpers.oracle import assert_engine_is_right, randomise, without_engine
from lalora_app import server_app
from lalora_app.adapter.factors import active_names, kind
from lalora_app.client.local_round import Local, apply, make_optimizer
from lalora_app.data.encoding import Batch, EncodedImages, EncodedSequences, EncodedTexts
from lalora_app.data.examples import split
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.mechanism import poisson_batch
from lalora_app.private_step.step import RandomStreams, private_gradient
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

INF = float("inf")
IMAGES = {"model.task": "image-classification", "model.pooling": "model"}
SMALL = {"model.image-size": 16, "model.image-resize": 16}
SWIN_32 = SHARED / "models" / "swin-small-32"
DINO = SHARED / "models" / "dinov2-vit-s14-saliency"


@pytest.fixture
def images(tiny, tiny_timm, tiny_vit, tiny_images) -> Callable[..., Config]:
    """Config factory of a tiny image model: timm's "swin" or "vit", or transformers' "hf-vit"."""

    def make(kind: str = "swin", **changes) -> Config:
        names = {name: f"timm:{folder}" for name, folder in tiny_timm.items()}
        base = {
            "model.name": (names | {"hf-vit": tiny_vit}).get(kind, kind),
            "data.name": tiny_images,
            "data.input-column": "image",
            "data.test-fraction": 0.2,
        }
        return tiny(**base | IMAGES | SMALL | changes)

    return make


@pytest.fixture
def texts(tiny, tiny_llama) -> Callable[..., Config]:
    """Config factory of a tiny text model: "bert", or the language model "llama"."""

    def make(kind: str = "bert", **changes) -> Config:
        language = {
            "model.name": tiny_llama,
            "model.task": "causal-lm",
            "data.label-column": "none",
            "data.partitioner": "iid",
        }
        return tiny(**(language if kind == "llama" else {}) | changes)

    return make


def pixels(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """What a model sees, by the book."""
    centre, spread = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    return (images / 255 - centre) / spread


def bare(backbone: Backbone) -> nn.Module:
    """The base model inside of the adapters."""
    return backbone.model.base_model.model


def refusal(config: Config) -> str:
    """The one line by which a model is refused."""
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def randomised(config: Config) -> Backbone:
    """The backbone with every tensor random and active: B at zero would hide A's gradient."""
    backbone, _ = build(config)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    torch.manual_seed(0)
    for parameter in backbone.engine.parameters.values():
        nn.init.normal_(parameter, std=0.3)
    return backbone


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swin", "vit", "hf-vit"])
def test_per_example_gradients_of_images(kind, images):
    backbone, _ = build(images(kind))
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    seen = normalised(pixels(4, 16).double(), [0.4] * 3, [0.2] * 3)
    labels = torch.tensor([0, 1, 1, 0])

    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        out = model(seen[indices])
        logits = getattr(out, "logits", out)
        return nn.functional.cross_entropy(logits, labels[indices], reduction="none")

    ways = (("fused", False), ("expanded", False))
    assert_engine_is_right(randomise(without_engine(backbone.model)), losses, ways=ways)


TEXT_BATCH = EncodedTexts(((2, 5, 6, 3), (2, 7, 3), (2, 8, 9, 10, 11, 3)), (0, 1, 0), pad=0)
LANGUAGE_BATCH = EncodedSequences(((2, 5, 6, 3), (2, 7, 3), (2, 8, 9, 10, 11, 3)))
IMAGE_BATCH = EncodedImages.of_one_size(pixels(3, 16), (0, 1, 0))
# The first layer of a block: its name, and the model's batch.
RECOMPUTED = {
    "bert": ("intermediate.dense", TEXT_BATCH),
    "llama": ("mlp.gate_proj", LANGUAGE_BATCH),
    "swin": ("mlp.fc1", IMAGE_BATCH),
    "vit": ("mlp.fc1", IMAGE_BATCH),
    "hf-vit": ("mlp.fc1", IMAGE_BATCH),
}
# transformers' ViT does both as its BERT and its Llama do
EVERY_KIND = ["bert", "llama", "swin", "vit", pytest.param("hf-vit", marks=pytest.mark.slow)]


@pytest.fixture
def any_model(images, texts):
    """Config factory of any of the tiny models."""

    def make(kind: str, **changes) -> Config:
        return (texts if kind in ("bert", "llama") else images)(kind, **changes)

    return make


def step(backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and per-example gradients of a batch."""
    size = len(batch.labels)
    grads = backbone.engine.gradients(lambda: backbone.losses(batch), size).dense()
    return backbone.losses(batch).detach(), grads


def assert_same_step(one, other) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert set(one[1]) == set(other[1])
    for name, grad in one[1].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(other[1][name], grad, rtol=1e-3, atol=1e-5)


def calls_of(backbone: Backbone, layer: str) -> list[str]:
    """Note every call of the layers of that name from now on."""
    calls: list[str] = []
    for path, module in backbone.model.named_modules():
        if path.endswith(layer):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    return calls


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_checkpointing_computes_twice_and_changes_no_gradient(kind, any_model):
    layer, encoded = RECOMPUTED[kind]
    batch = encoded.batch([0, 1, 2])
    steps = []
    for again in (False, True):
        backbone = randomised(any_model(kind, **{"model.checkpointing": again}))
        steps.append(step(backbone, batch))
        calls = calls_of(backbone, layer)
        backbone.engine.gradients(lambda b=backbone: b.losses(batch), 3)
        layers = set(calls)
        assert len(layers) >= 2
        assert all(calls.count(path) == 1 + again for path in layers)
        calls.clear()
        backbone.evaluate([batch])  # nothing goes back: nothing is computed again
        assert sorted(calls) == sorted(layers)
    assert_same_step(*steps)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_nothing_drops_out_under_checkpointing(kind, any_model):
    """transformers recomputes in training mode only, in which dropout would be on."""
    backbone = randomised(any_model(kind, **{"model.checkpointing": True}))
    dropouts = [m for m in backbone.model.modules() if isinstance(m, nn.Dropout)]
    assert not any(module.training for module in dropouts)
    batch = RECOMPUTED[kind][1].batch([0, 1, 2])
    assert torch.equal(backbone.losses(batch), backbone.losses(batch))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_both_kinds_of_attention_compute_the_same(kind, any_model):
    batch = RECOMPUTED[kind][1].batch([0, 1, 2])
    steps = {}
    for attention in ("eager", "sdpa", "auto") if kind in ("swin", "vit") else ("eager", "sdpa"):
        backbone = randomised(any_model(kind, **{"model.attention": attention}))
        steps[attention] = step(backbone, batch)
        fused = {m.fused_attn for m in bare(backbone).modules() if hasattr(m, "fused_attn")}
        if kind in ("swin", "vit"):  # timm's own choice for Swin is eager
            assert fused == {attention == "sdpa" or (attention == "auto" and kind == "vit")}
        else:
            assert bare(backbone).config._attn_implementation == attention
    for other in steps.values():
        assert_same_step(steps["eager"], other)


def test_timms_own_choice_of_attention_comes_back(any_model):
    from timm.layers import use_fused_attn

    before = use_fused_attn(), use_fused_attn(experimental=True)
    for attention in ("sdpa", "eager"):
        randomised(any_model("swin", **{"model.attention": attention}))
        assert (use_fused_attn(), use_fused_attn(experimental=True)) == before


# --- heads, and what a checkpoint does not have -----------------------------------------------


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


# --- transformers' image models ---------------------------------------------------------------


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


# --- timm ------------------------------------------------------------------------------------


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


# --- errors -----------------------------------------------------------------------------------


def test_an_image_size_that_is_not_the_models_is_one_line(images):
    for name in ("swin", "hf-vit"):
        line = refusal(images(name, **{"model.image-size": 32, "model.image-resize": 32}))
        assert line == "model.image-size=32 must be 16, the model's own"


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_timm_has_no_text_models(task, tiny_timm, tiny):
    line = refusal(tiny(**{"model.name": f"timm:{tiny_timm['vit']}", "model.task": task}))
    assert line == f'model.task="{task}" must be "image-classification" for timm'


TIMM_NAMES = {
    "a misspelt name": ("swin_tinny_patch4", "must be an architecture of timm: swin"),
    "no name": ("", "must be an architecture of timm"),
    "no folder": ("/no/such/folder", "must be a folder with a config.json"),
    "a head of several layers": ("resnet10t", "cannot be loaded"),
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


def damaged(folder: str, copy: Path, file: str, content: bytes | None) -> str:
    shutil.copytree(folder, copy)
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    return str(copy)


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


def test_damaged_weights_of_timm_are_one_line(images, tiny_timm, tmp_path):
    folder = damaged(tiny_timm["vit"], tmp_path / "copy", "model.safetensors", b"12345678")
    assert "cannot be loaded" in refusal(images(f"timm:{folder}"))


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_one_line(tiny, tiny_model, tmp_path):
    """Privacy: a text with such a token would end a round that others would not."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["secret"])
    tokenizer.save_pretrained(folder)
    line = refusal(tiny(**{"model.name": str(folder)}))
    rows = len(WORDS)
    assert line.endswith(f"token {rows} is beyond its {rows} rows")


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


# --- whole runs -------------------------------------------------------------------------------


def finished(config: Config, monkeypatch) -> tuple[Path, dict]:
    """Run a federation of two clients; return its adapter's folder and its summary."""
    do_not_wait_for_nodes(monkeypatch)
    server_app.run(FakeGrid(config, 2), config)
    (folder,) = Path(config.output).iterdir()
    return folder / "adapter", json.loads((folder / "summary.json").read_text("utf-8"))


def stock(kind: str, folder: str) -> nn.Module:
    """The base model with a head of two labels, as anyone would load it."""
    from transformers import AutoModelForImageClassification

    torch.manual_seed(99)  # its own head is another one
    if kind == "hf-vit":
        options = {"num_labels": 2, "ignore_mismatched_sizes": True}
        return AutoModelForImageClassification.from_pretrained(folder, **options)
    model = timm_class(kind, num_classes=2)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    return model


@pytest.mark.parametrize("kind", ["swin", "hf-vit"])
def test_a_run_on_images_ends_with_an_adapter_for_the_stock_model(
    kind, images, tiny_timm, tiny_vit, monkeypatch
):
    from peft import PeftModel

    rates = {"train.optimizer": "adamw", "train.lr-a": 0.01, "train.lr-b": 0.01}
    sizes = {"train.batch-size": 24, "train.local-steps": 6, "train.lr-head": 0.1}
    repeatable = {"privacy.epsilon": INF, "privacy.noise": "seeded", "num-server-rounds": 2}
    config = images(kind, **rates, **sizes, **repeatable)
    adapter, summary = finished(config, monkeypatch)
    assert summary["status"] == "completed"

    folder = tiny_timm.get(kind, tiny_vit)
    model = PeftModel.from_pretrained(stock(kind, folder), adapter).eval()
    mean, std = ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]) if kind == "hf-vit" else ([0.4] * 3, [0.2] * 3)
    right, (_, test) = [], split(config.data)
    backbone, _ = build(config)
    for row in range(len(test)):
        stored = backbone.encode(test).stacks[0][row : row + 1]
        with torch.no_grad():
            out = model(normalised(stored, mean, std))
        right.append(int(getattr(out, "logits", out).argmax()) == test.labels[row])
    assert summary["accuracy"] == pytest.approx(np.mean(right), abs=1.5 / len(test))
    assert summary["accuracy"] > 0.8  # the two classes differ in brightness
    named = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    assert named["modules_to_save"] == (["classifier"] if kind == "hf-vit" else ["head.fc"])


# --- the sizes of the presets -----------------------------------------------------------------


def one_private_step(backbone: Backbone, data, factors: str) -> None:
    """A noised step of the given factors: finite, of the active tensors, and it moves them."""
    rate = 3 / len(data)
    assert len(poisson_batch(len(data), rate, seeded(1, "sampling"))) in (2, 3, 4)
    names = active_names(backbone.engine.parameters, frozenset(factors))
    before = backbone.adapter()
    backbone.engine.activate(names)
    noised = private_gradient(
        backbone,
        data,
        reservation=Reservation(Release(rate, 1.0, 1)),
        clip_norm=1.0,
        micro_batch=4,
        streams=RandomStreams(seeded(1, "sampling"), seeded(1, "noise")),
    )
    assert set(noised) == names
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in noised.values())
    config, method = make_config(**{"train.optimizer": "adamw"}), METHODS["la-lora"]
    local = Local(method, 1, 1, config.train, config.rule, 1.0)
    apply(backbone, make_optimizer(backbone, local, 0.0), method.postprocess(noised))
    after = backbone.adapter()
    for name, array in after.items():
        assert (array.tobytes() != before[name].tobytes()) == (name in names), name
        assert np.isfinite(array).all()


def lora_parameters(start: dict[str, np.ndarray]) -> int:
    return sum(array.size for name, array in start.items() if kind(name) != "head")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swin_base_patch4_window7_224", 1_155_072),
        ("swin_tiny_patch4_window7_224", 423_936),
    ],
)
def test_the_swins_of_the_presets(name, expected):
    labels = {"model.weights": "random", "lora.rank": 16, "data.num-labels": 100}
    config = make_config(**IMAGES, **labels, **{"model.name": f"timm:{name}"})
    backbone, start = build(config)
    assert lora_parameters(start) == expected
    heads = sorted(array.shape for name, array in start.items() if kind(name) == "head")
    assert [shape[0] for shape in heads] == [100, 100]
    data = EncodedImages.of_one_size(pixels(8, 224), tuple(range(8)))
    for factors in ("B", "A"):
        one_private_step(backbone, data, factors)


@pytest.mark.slow
def test_the_roberta_of_the_presets(tmp_path):
    from transformers import RobertaConfig

    RobertaConfig().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = make_config(
        **{
            "model.name": str(tmp_path),
            "model.weights": "random",
            "model.pooling": "model",
            "model.max-length": 128,
            "lora.rank": 8,
            "lora.targets": "query,key,value,attention.output.dense",
        }
    )
    backbone, start = build(config)
    assert lora_parameters(start) == 589_824
    rng = np.random.default_rng(0)
    tokens = tuple(tuple(rng.integers(2, 1000, 5 + 9 * i).tolist()) for i in range(8))
    data = EncodedTexts(tokens, (0, 1) * 4, pad=1)
    for factors in ("B", "A"):
        one_private_step(backbone, data, factors)
