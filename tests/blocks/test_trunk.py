"""``model.prefix-cache`` of a method that trains the head alone: the head's input is kept.

In float64 the gradients agree with those of the whole model to 1e-10.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from helpers.architectures import save_image_model, save_text_model
from helpers.model_checks import TEXTS, pixels, refusal
from helpers.oracle import assert_equal
from lalora_app.blocks import prefix_checks
from lalora_app.blocks.kept_states import StatesInMemory
from lalora_app.blocks.prefix import Prefix
from lalora_app.blocks.trunk import Trunk
from lalora_app.blocks.with_states import WithStates, size_of
from lalora_app.data.encoding import Batch, EncodedImages
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.forwards import masked_mean
from lalora_app.settings.run_config import Config

HEAD = {"method": "head-only", "model.prefix-cache": True, "secure-aggregation": "none"}
IMAGES = EncodedImages.of_one_size(pixels(4, 16), (0, 1, 1, 0))
ONE_VECTOR = ["bert", "timm:vit", "timm:swin", "timm:convnext", "vit"]
PER_TOKEN = ["roberta", "bert mean"]


@pytest.fixture
def a_model(tiny, images, tmp_path):
    def make(kind: str, **changes) -> Config:
        keys = HEAD | changes
        if kind.startswith("timm:"):
            return images(kind.removeprefix("timm:"), **keys)
        if kind == "vit":
            return images(save_image_model(kind, tmp_path / kind), **keys)
        name, *mean = kind.split()
        folder = save_text_model(name, tmp_path / name, initializer_range=0.3)
        pooling = {"model.pooling": "mean"} if mean else {}
        return tiny(**{"model.name": folder} | pooling | keys)

    return make


def data_of(kind: str):
    return IMAGES if "vit" in kind or kind.startswith("timm:") else TEXTS


def wide_losses(backbone: Backbone, batch: Batch, kind: str) -> Tensor:
    """Losses in float64; the app's own forward passes round logits to float32."""
    if data_of(kind) is IMAGES:
        out = backbone.model(batch.inputs.double() / 255)
    else:
        out = backbone.model(input_ids=batch.inputs, attention_mask=batch.mask)
    logits = getattr(out, "logits", out)
    logits = masked_mean(logits, batch.mask) if kind.endswith("mean") else logits
    return nn.functional.cross_entropy(logits, batch.labels, reduction="none")


def wide_gradients(backbone: Backbone, batch: Batch, kind: str) -> dict[str, Tensor]:
    def losses() -> Tensor:
        with backbone.prefix.starting_from(batch.states):
            return wide_losses(backbone, batch, kind)

    return backbone.engine.gradients(losses, len(batch.labels)).dense()


def in_float64(backbone: Backbone, start) -> None:
    """Train the head alone, from random numbers."""
    backbone.engine.activate(frozenset(start))
    backbone.model.double()
    torch.manual_seed(0)
    for name in start:
        nn.init.normal_(backbone.engine.parameters[name], std=0.3)


@pytest.mark.parametrize("kind", [*ONE_VECTOR, *PER_TOKEN])
@pytest.mark.usefixtures("wide_softmax")
def test_gradients_of_the_head_are_those_of_the_whole_model(kind, a_model):
    backbone, start = build(a_model(kind))
    assert isinstance(backbone.prefix, Trunk)
    in_float64(backbone, start)
    data = data_of(kind)

    @torch.no_grad()
    def compute(batch: Batch) -> Tensor:
        return backbone.prefix.states(lambda: wide_losses(backbone, batch, kind))

    memory = StatesInMemory()
    cached = WithStates(data, backbone.prefix, compute, memory, torch.float64)
    for indices in ([1, 2], [2, 1], [0, 1, 2], [0, 2, 1]):
        for width in (0, 12):
            expected = wide_gradients(backbone, data.batch(indices, width), kind)
            found = wide_gradients(backbone, cached.batch(indices, width), kind)
            assert set(found) == set(start)
            assert_equal(found, expected, 1e-10)
    sizes = [size_of(data, backbone.prefix, index, torch.float64) for index in range(3)]
    assert memory.size_in_bytes() == sum(sizes) + 3 * 32  # and a key for each


@pytest.mark.parametrize("kind", ONE_VECTOR)
def test_an_example_is_kept_as_one_vector(kind, a_model):
    backbone, _ = build(a_model(kind))
    sizes = {size_of(data_of(kind), backbone.prefix, index) for index in range(3)}
    assert sizes == {backbone.prefix.features * 2}


@pytest.mark.parametrize("kind", ["bert", "timm:swin"])
def test_nothing_below_the_head_computes_twice_for_an_example(kind, a_model):
    backbone, _ = build(a_model(kind))
    calls: list[int] = []
    for module in backbone.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda *_: calls.append(1))
    cached = WithStates(data_of(kind), backbone.prefix, backbone.states, StatesInMemory())
    backbone.losses(cached.batch([0, 1, 2]))
    assert calls
    calls.clear()
    backbone.losses(cached.batch([2, 0]))
    assert not calls
    backbone.logits(data_of(kind).batch([0]))  # an evaluation computes everything
    assert calls


def test_an_evaluation_is_that_of_the_model_after_a_failed_pass(a_model):
    backbone, _ = build(a_model("bert"))
    batch = TEXTS.batch([0, 1])
    before = backbone.logits(batch)
    with pytest.raises(ValueError, match="stop"), backbone.prefix.starting_from(before[:, None]):
        raise ValueError("stop")
    assert torch.equal(backbone.logits(batch), before)


def test_a_head_inside_a_decoder_is_divided_at_its_blocks(a_model):
    """Its head computes a vector for each token, of which the model takes the last."""
    backbone, _ = build(a_model("llama", **{"lora.layers": "last:1"}))
    assert isinstance(backbone.prefix, Prefix)


def test_a_head_of_two_modules_is_refused_where_no_block_can_be_left_out(a_model):
    line = refusal(a_model("distilbert", **{"model.pooling": "model"}))
    assert line.startswith("model.prefix-cache=true must be false for adapters in the first block")
    assert line.endswith(
        'method="head-only" would need no adapters there, but the head of this model does not '
        "compute from one input alone"
    )


def test_memory_that_runs_out_is_no_reason_to_divide_elsewhere(a_model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(prefix_checks, "check_prefix", full)
    with pytest.raises(torch.OutOfMemoryError):
        build(a_model("bert"))


def test_other_methods_keep_the_blocks_below_their_adapters(a_model):
    keys = {"method": "rolora", "lora.layers": "last:1"}
    one, _ = build(a_model("bert", **keys))
    head, _ = build(a_model("bert", **{"lora.layers": "last:1"}))
    assert isinstance(one.prefix, Prefix)
    assert isinstance(head.prefix, Trunk)
    assert one.prefix.fingerprint != head.prefix.fingerprint
    assert one.model is not head.model


def test_without_the_cache_the_model_is_shared_with_other_methods(a_model):
    config = a_model("bert", **{"model.prefix-cache": False})
    head, _ = build(config)
    rolora, _ = build(replace(config, method="rolora"))
    assert head.prefix is None
    assert head.model is rolora.model
