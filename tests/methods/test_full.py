"""Full fine-tuning, `full`: the whole weights of the target layers train, travel and are saved."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.app_runs import arrays, open_run, run
from helpers.architectures import save_text_model
from helpers.exported import CLASSES, exported, logits_of, random_texts, stock_base, tokens_of
from helpers.model_checks import LANGUAGE_BATCH, active, bare, image_losses, pixels, text_losses
from helpers.oracle import assert_engine_is_right
from lalora_app.adapter.factors import kind
from lalora_app.adapter.whole_linear import whole_layers
from lalora_app.data.encoding import EncodedImages
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import build
from lalora_app.models.device import narrow_frozen
from lalora_app.private_step.shared_rows import expand_shared_rows
from lalora_app.settings.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
WAYS = (("plain", False),)
PHASES = [("W", 3), ("", 2), ("W", 1)]
SGD = {"train.optimizer": "sgd", "privacy.clip-norm": float("inf"), "privacy.noise": "seeded"}


def test_the_gradients_of_windows_of_images(images):
    backbone, _ = build(images("swin", method="full"))
    model = active(backbone)
    assert_engine_is_right(model, image_losses, ways=WAYS, phases=PHASES)


@pytest.mark.parametrize("name", ["bert", "gpt2", "deberta-v3"])
def test_the_gradients_of_texts_of_several_lengths_and_of_shared_rows(name, tiny, tmp_path):
    folder = save_text_model(name, tmp_path)
    changes = {"model.name": folder, "model.pooling": "model", "lora.targets": "all-linear"}
    backbone, _ = build(tiny(method="full", **changes))
    ways, phases = WAYS, PHASES
    prepare = expand_shared_rows if name.startswith("deberta") else lambda model: None
    model = active(backbone)
    assert_engine_is_right(model, text_losses, ways=ways, phases=phases, prepare=prepare)


def test_the_weight_changes_and_the_frozen_one_does_not(tiny):
    config = tiny(**open_run(method="full"))
    model, start = build(config)
    layers = whole_layers(model.model)
    assert len(layers) == 4  # query and value of two layers
    assert {kind(name) for name in start} == {"W", "head"}
    assert not any(array.any() for name, array in start.items() if kind(name) == "W")
    frozen = {path: layer.base_layer.weight.clone() for path, layer in layers.items()}
    done = run(config)
    state = done.folder.latest()
    assert not state.drift
    model.load(state.adapter)
    for path, layer in layers.items():
        moved = torch.from_numpy(state.adapter[f"{path}.lora_W.weight"])
        assert moved.any()
        assert torch.equal(layer.base_layer.weight, frozen[path])
        found = model.frozen_weights.computed(f"{path}.lora_W.weight")
        torch.testing.assert_close(found, frozen[path] + moved)
    sent = arrays(done.grid.trained(1)[0].reply)
    assert {sent[n].shape for n in sent if kind(n) == "W"} == {(16, 16)}


def test_without_a_learning_rate_of_the_weights_the_head_trains_alone(tiny, tmp_path):
    """Limit: a vanishing rate of W, without a clip, is the baseline of the frozen model."""
    rates = {"train.lr-w": 1e-30, "train.lr-head": 0.1, "train.batch-size": 60}
    heads = []
    for method in ("full", "head-only"):
        config = tiny(**open_run(method=method) | rates | SGD | {"output": f"{tmp_path}/{method}"})
        adapter = run(config).folder.latest().adapter
        heads.append({n: x for n, x in adapter.items() if kind(n) == "head"})
    for name in heads[1]:
        np.testing.assert_allclose(heads[0][name], heads[1][name], atol=1e-6)


def test_it_is_lora_of_full_rank_with_a_frozen_identity(tiny):
    """Limit: with A = I and scale 1, B of FFA-LoRA has the gradient of W."""
    rates = {"train.lr-w": 0.5, "train.lr-b": 0.5, "train.lr-head": 0.5}
    full = tiny(**open_run(method="full") | SGD | rates)
    lora = tiny(**open_run(method="ffa-lora", **{"lora.rank": 16, "lora.alpha": 16.0}) | rates)
    whole, start = build(full)
    factors, other = build(lora)
    data = whole.encode(_texts(full))
    batch = data.batch(range(6))
    eye = {n: np.eye(16, dtype="f4") if kind(n) == "A" else x for n, x in other.items()}
    factors.load(eye)
    whole.load(start)
    for model, names in ((whole, start), (factors, other)):
        wanted = [n for n in names if kind(n) in ("W", "B", "head")]
        model.engine.activate(frozenset(wanted))
    found, expected = (
        model.engine.gradients(lambda m=model: m.losses(batch), 6) for model in (whole, factors)
    )
    torch.testing.assert_close(found.norms(), expected.norms().double(), rtol=1e-4, atol=0)
    dense = expected.dense()
    for name, grad in found.dense().items():
        same = dense[name.replace("lora_W", "lora_B")]
        torch.testing.assert_close(grad, same, rtol=1e-3, atol=1e-6)


def _texts(config):
    from lalora_app.data.examples import split

    return split(config.data)[0]


# GPT-2 stores its weights transposed.
@pytest.mark.parametrize(("name", "pooling"), [("bert", "mean"), ("gpt2", "model")])
def test_peft_and_plain_weights_compute_what_was_trained(name, pooling, tiny, tmp_path):
    from peft import PeftModel

    folder = save_text_model(name, tmp_path / "base", initializer_range=0.3)
    keys = {"model.name": folder, "model.pooling": pooling, "method": "full"}
    done = exported(tiny(**keys | CLASSES), tmp_path)
    texts = random_texts()
    expected = done.logits(texts)
    base = stock_base(done.config)
    adapted = PeftModel.from_pretrained(base, done.adapter).eval()
    tokens, mean = tokens_of(done.adapter, texts), pooling == "mean"
    base.config.pad_token_id = 0
    torch.testing.assert_close(logits_of(adapted, tokens, mean), expected, rtol=1e-4, atol=1e-4)
    again = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(again, tokens, mean), expected, rtol=1e-4, atol=1e-4)
    plain = done.load_merged()
    torch.testing.assert_close(logits_of(plain, tokens), expected, rtol=1e-4, atol=1e-4)


def test_plain_weights_of_a_timm_model_compute_what_was_trained(images, tmp_path):
    changes = {"data.labels": "a,b", "data.num-labels": 2}
    done = exported(images("swin", method="full", **changes), tmp_path)
    seen = EncodedImages.of_one_size(pixels(8, 16), (0,) * 8).batch(range(8))
    with torch.no_grad():
        expected = done.backbone.logits(seen)
        forward = done.backbone.forward
        torch.testing.assert_close(forward(done.load_merged(), seen.inputs, None), expected)


@pytest.mark.parametrize("again", [True, False])
def test_checkpointing_and_last_blocks_change_no_gradient(again, tiny):
    found = []
    for changes in ({}, {"model.checkpointing": again, "lora.layers": "last:1"}):
        config = tiny(method="full", **changes)
        backbone, start = build(config)
        backbone.load(start)
        backbone.engine.activate(frozenset(start))
        batch = backbone.encode(_texts(config)).batch(range(4))
        found.append(backbone.engine.gradients(lambda b=backbone: b.losses(batch), 4).dense())  # noqa: B023
    assert sum(kind(name) == "W" for name in found[1]) == 2  # query and value of the last block
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, found[0][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cache", [True, False])
def test_a_cache_of_the_blocks_below_is_allowed(cache, tiny):
    changes = {"lora.layers": "last:1", "model.prefix-cache": cache, "privacy.noise": "seeded"}
    done = run(tiny(**open_run(method="full", **changes)))
    assert [row["aggregated"] for row in done.rows] == [True] * 3


def test_a_language_model_trains(texts):
    config = texts("llama", method="full")
    backbone, _ = build(config)
    batch = LANGUAGE_BATCH.batch([0, 1, 2])
    grads = backbone.engine.gradients(lambda: backbone.losses(batch), 3)
    assert bool((grads.norms() > 0).all())
    assert not any("lora_A" in path for path, _ in bare(backbone).named_modules())


def test_under_bf16_the_sum_of_both_weights_stays_in_float32(tiny):
    backbone, _ = build(tiny(method="full"))
    narrow_frozen(backbone.model, torch.bfloat16)
    kept = {id(layer.base_layer) for layer in whole_layers(backbone.model).values()}
    linear = [m for m in backbone.model.modules() if type(m) is nn.Linear]
    frozen = [m for m in linear if not m.weight.requires_grad]
    assert {m.weight.dtype for m in frozen if id(m) in kept} == {torch.float32}
    assert {m.weight.dtype for m in frozen if id(m) not in kept} == {torch.bfloat16}


def test_ranks_of_clients_are_refused(tiny):
    with pytest.raises(ConfigError, match=r'^lora\.ranks="1,2" must be "none" for method full'):
        method_of(tiny(method="full", **{"lora.ranks": "1,2"}))
