"""Test gradients of real architectures, with checkpointing and both kinds of attention."""

import pytest
import torch
from torch import Tensor, nn

from helpers.model_checks import (
    IMAGE_BATCH,
    LANGUAGE_BATCH,
    TEXT_BATCH,
    bare,
    normalised,
    pixels,
    randomised,
)
from helpers.oracle import assert_engine_is_right, randomise, without_engine
from lalora_app.data.encoding import Batch
from lalora_app.models.backbone import Backbone, build
from lalora_app.settings.run_config import Config


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
