"""Every architecture that the app trains: targets, gradients, runs, and those that are refused."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import ROOT, WORDS, save_tokenizer, timm_class
from helpers.architectures import IMAGE_MODELS, save_image_model, save_text_model
from helpers.model_checks import (
    FUSED,
    PHASES,
    TEXTS,
    active,
    image_losses,
    randomised,
    refusal,
    text_losses,
)
from helpers.oracle import assert_engine_is_right, randomise
from lalora_app.adapter.factors import kind as kind_of
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.models.backbone import Backbone, build
from lalora_app.private_step.attach import LayoutError

# architecture -> the layers that "auto" adapts; the ones that differ most from BERT run always
AUTO = {
    "albert": "query value",
    "deberta": "in_proj",
    "deberta-v3": "query_proj value_proj",
    "modernbert": "Wqkv",
    "gpt2": "c_attn",
    "gemma2": "q_proj v_proj",
    "t5": "q v",
}
WIDE = {
    "bert": "query value",
    "roberta": "query value",
    "distilbert": "q_lin v_lin",
    "electra": "query value",
    "deberta-v2": "query_proj value_proj",
    "llama": "q_proj v_proj",
    "mistral": "q_proj v_proj",
    "qwen2": "q_proj v_proj",
    "qwen3": "q_proj v_proj",
    "gemma": "q_proj v_proj",
    "gemma3": "q_proj v_proj",
    "phi": "fc1 fc2 q_proj v_proj",
    "phi3": "qkv_proj",
    "opt": "q_proj v_proj",
    "bloom": "query_key_value",
    "gpt-neox": "query_key_value",
    "falcon": "query_key_value",
    "mixtral": "q_proj v_proj",
}
IMAGES = {
    "beit": "q_proj v_proj",
    "swinv2": "query value",
    "convnext": "pwconv1 pwconv2",
}
WIDE_IMAGES = {
    "vit": "q_proj v_proj",
    "deit": "q_proj v_proj",
    "dinov2": "q_proj v_proj",
    "swin": "q_proj v_proj",
    "convnextv2": "pwconv1 pwconv2",
}
TIMM = {
    "swinv2": "attn.proj mlp.fc1 mlp.fc2",
    "beit": "attn.proj mlp.fc1 mlp.fc2",
    "convnext": "mlp.fc1 mlp.fc2",
}


def with_wide(always: dict[str, str], wide: dict[str, str]) -> list:
    extra = [pytest.param(*entry, marks=pytest.mark.wide) for entry in wide.items()]
    return [*always.items(), *extra]


def adapted(backbone: Backbone) -> set[str]:
    """The last names of the layers with LoRA."""
    paths = [n.split(".lora_A.")[0] for n in backbone.engine.parameters if ".lora_A." in n]
    return {path.split(".")[-1] for path in paths}


@pytest.mark.parametrize(("kind", "names"), with_wide(AUTO, WIDE))
@pytest.mark.usefixtures("wide_softmax")
def test_targets_and_gradients_of_text_models(kind, names, tiny, tmp_path):
    backbone, _ = build(tiny(**{"model.name": save_text_model(kind, tmp_path)}))
    assert adapted(backbone) == set(names.split())
    assert_engine_is_right(active(backbone), text_losses, ways=FUSED, phases=PHASES)


def test_the_layers_that_albert_calls_twice_get_the_sum_of_both_calls(tiny, tmp_path):
    backbone, _ = build(tiny(**{"model.name": save_text_model("albert", tmp_path)}))
    assert backbone.targets == 2  # of one group, which the model calls twice
    assert backbone.model.config.num_hidden_layers == 2
    assert_engine_is_right(active(backbone), text_losses, phases=PHASES)  # every kernel


@pytest.mark.parametrize(("kind", "names"), with_wide(IMAGES, WIDE_IMAGES))
def test_targets_and_gradients_of_transformers_image_models(kind, names, images, tmp_path):
    backbone, _ = build(images(save_image_model(kind, tmp_path)))
    assert adapted(backbone) == set(names.split())
    assert_engine_is_right(active(backbone), image_losses, ways=FUSED, phases=PHASES)


@pytest.mark.parametrize(("kind", "names"), TIMM.items())
def test_targets_and_gradients_of_timm_models(kind, names, images):
    backbone, _ = build(images(kind))
    assert adapted(backbone) == {name.split(".")[-1] for name in names.split()}
    assert_engine_is_right(active(backbone), image_losses, ways=FUSED, phases=PHASES)


# --- all-linear -------------------------------------------------------------------------------


def linear_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize("kind", ["bert", "deberta", "gpt2"])
def test_all_linear_is_pefts_choice(kind, tiny, tmp_path):
    """The same layers as PEFT's own rule takes on the stock model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    folder = save_text_model(kind, tmp_path)
    backbone, start = build(tiny(**{"model.name": folder, "lora.targets": "all-linear"}))
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", **options)
    theirs = get_peft_model(base, settings).named_parameters()
    expected = {n.split(".lora_A.")[0] for n, _ in theirs if ".lora_A." in n}
    assert {n.split(".lora_A.")[0] for n in start if ".lora_A." in n} == expected
    assert backbone.targets == len(expected)


def test_all_linear_leaves_out_a_language_models_output_layer(texts):
    backbone, _ = build(texts("llama", **{"lora.targets": "all-linear"}))
    layer = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert adapted(backbone) == set(layer.split())


def test_all_linear_leaves_out_what_lora_cannot_train(images):
    """SwinV2's qkv, which is never called, and the layers that see positions and no image."""
    backbone, _ = build(images("swinv2", **{"lora.targets": "all-linear"}))
    assert adapted(backbone) == {"proj", "fc1", "fc2", "reduction"}
    assert_engine_is_right(active(backbone), image_losses, ways=FUSED, phases=PHASES)
    left = linear_paths(timm_class("swinv2", num_classes=2))
    assert {path.split(".")[-2] for path in left if "cpb" in path} == {"cpb_mlp"}


def test_all_linear_of_deberta_trains_its_positions(tiny, tmp_path):
    folder = save_text_model("deberta-v3", tmp_path)
    backbone, _ = build(tiny(**{"model.name": folder, "lora.targets": "all-linear"}))
    assert {"query_proj", "key_proj", "value_proj", "dense"} == adapted(backbone)


# --- decoders without a padding token ---------------------------------------------------------


def without_padding(folder: Path, **options) -> str:
    """A folder whose tokenizer has no padding token."""
    save_tokenizer(folder, pad_token=None, **options)
    return str(folder)


END = WORDS.index("[SEP]")


@pytest.fixture(params=["gpt2", "llama", "gemma"])
def no_padding(request, tmp_path) -> str:
    """A decoder whose tokenizer ends a text by a token, and has none for padding."""
    save_text_model(request.param, tmp_path, pad_token_id=None)
    return without_padding(tmp_path, eos_token="[SEP]")


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_decoder_without_a_padding_token_pads_with_its_end_token(pooling, no_padding, tiny):
    backbone, _ = build(tiny(**{"model.name": no_padding, "model.pooling": pooling}))
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    randomise(backbone.model).float()
    tokens = (
        (2, 5, 6),
        (2, 7, 8, 9, 10, 11, 12),
        (2, 9, END),  # ends in the padding token
        (2, END, 10, 11),  # holds it
        (2, 5, END, END),
        (END,),  # nothing else
        (END, END, 6),
    )
    texts = EncodedTexts(tokens, (0,) * len(tokens), pad=END)
    together = backbone.logits(texts.batch(range(len(tokens)), width=16))
    for row in range(len(tokens)):
        for width in (0, 8):
            alone = backbone.logits(texts.batch([row], width))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_its_gradients_are_those_of_one_text_at_a_time(no_padding, tiny):
    backbone, _ = build(tiny(**{"model.name": no_padding}))
    tokens = ((2, 5, 6), (2, 7, 8, 9, 10, 11), (2, 9, 8, END), (2, END, 10, 11))
    texts = EncodedTexts(tokens, (0, 1, 0, 1), pad=END)

    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        batch = texts.batch(indices)
        logits = model(input_ids=batch.inputs, attention_mask=batch.mask).logits
        return nn.functional.cross_entropy(logits, batch.labels, reduction="none")

    assert_engine_is_right(active(backbone), losses, ways=FUSED, phases=PHASES)


def test_texts_are_encoded_with_that_padding(no_padding, tiny):
    config = tiny(**{"model.name": no_padding})
    backbone, _ = build(config)
    data = backbone.encode(split(config.data)[0])
    batch = data.batch([0, 1], width=16)
    assert data.pad == END
    assert (batch.inputs[batch.mask == 0] == END).all()


def test_a_tokenizer_with_neither_padding_nor_end_is_one_line(tiny, tmp_path):
    save_text_model("gpt2", tmp_path)
    folder = without_padding(tmp_path)
    assert refusal(tiny(**{"model.name": folder})) == (
        f'model.name="{folder}" must have a tokenizer with a padding token or a token for the end '
        'of a text ("pad_token" or "eos_token" in its tokenizer_config.json)'
    )


# --- what cannot be trained -------------------------------------------------------------------


def test_targets_that_a_model_reads_without_a_call_are_one_line(images):
    line = refusal(images("beit", **{"lora.targets": "attn.qkv,attn.proj"}))
    assert line == (
        'lora.targets="attn.qkv,attn.proj" must leave out blocks.0.attn.qkv: the model reads its '
        "weight without calling it, so PEFT's LoRA would have no effect; it may name Linear layers "
        "of the model, such as fc1, fc2, proj"
    )


def test_targets_that_see_rows_of_no_example_are_one_line(images):
    line = refusal(images("swinv2", **{"lora.targets": "cpb_mlp.0"}))
    assert "layers.0.blocks.0.attn.cpb_mlp.0: it sees rows that belong to no example" in line


def test_convolutions_are_one_line(images, tmp_path):
    for targets in ("auto", "all-linear", "conv1"):
        line = refusal(images(save_image_model("resnet", tmp_path), **{"lora.targets": targets}))
        assert line.endswith(
            "must have Linear layers outside its head: LoRA trains no convolutions; ViT, Swin and "
            "ConvNeXt have such layers"
        )
    line = refusal(images("convnext", **{"lora.targets": "conv_dw"}))
    assert line.startswith('lora.targets="conv_dw" must name Linear layers of the model, such as ')


def test_quantised_weights_are_one_line(tiny, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    line = refusal(tiny(**{"model.name": str(folder)}))
    assert line.startswith(f'model.name="{folder}" must have weights that are not quantised')


def test_a_mean_over_tokens_that_transformers_does_not_have_is_one_line(tiny, tmp_path):
    folder = save_text_model("opt", tmp_path)
    line = refusal(tiny(**{"model.name": folder, "model.pooling": "mean"}))
    assert line.startswith('model.pooling="mean" must be "model" for opt')


def test_names_of_layers_select_none_of_a_head_that_trains_whole(tiny, tmp_path):
    """RoBERTa's head has a layer ``dense`` too."""
    folder = save_text_model("roberta", tmp_path)
    backbone, start = build(tiny(**{"model.name": folder, "lora.targets": "dense"}))
    assert backbone.targets == 6
    assert not any("classifier" in name for name in start if kind_of(name) != "head")
    line = refusal(tiny(**{"model.name": folder, "lora.targets": "classifier.dense"}))
    assert line.startswith('lora.targets="classifier.dense" must name Linear layers')


def test_layers_with_the_tokens_before_the_examples_are_one_line(tiny, tmp_path):
    """Longformer: its rows would be divided wrongly wherever the numbers divide."""
    folder = save_text_model("longformer", tmp_path)
    with pytest.raises(
        LayoutError, match=r"^lora\.targets=.* rows of shape \(8, 3\) do not divide"
    ):
        build(tiny(**{"model.name": folder}))


def test_a_model_that_fails_on_random_inputs_is_one_line(tiny, tmp_path, monkeypatch):
    from transformers import BertForSequenceClassification

    def fails(self, *_, **__):
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(BertForSequenceClassification, "forward", fails)
    folder = save_text_model("bert", tmp_path)
    line = refusal(tiny(**{"model.name": folder}))
    assert line == f'model.name="{folder}" fails on random inputs: no'


def test_a_layer_before_frozen_zeros_is_told_as_one(images, tiny_timm, tmp_path):
    shutil.copy(Path(tiny_timm["swinv2"]) / "config.json", tmp_path)
    config = images(f"timm:{tmp_path}", **{"model.weights": "random"})  # its norms begin at zero
    with pytest.raises(LayoutError, match="frozen weights behind it may be zero") as caught:
        build(config)
    assert str(caught.value).startswith('lora.targets="auto" does not fit model.name="timm:')


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "compiles"), [("deberta-v3", True), ("deberta", False)])
def test_deberta_under_torch_compile(kind, compiles, tiny, tmp_path, monkeypatch):
    """By graph capture only, which needs no C++ compiler; it cannot capture the first DeBERTa."""
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    folder = save_text_model(kind, tmp_path)
    config = tiny(**{"model.name": folder, "lora.kernel": "compiled"})
    if not compiles:
        assert refusal(config).startswith('lora.kernel="compiled" must be another one')
        return
    backbones = [randomised(config), randomised(tiny(**{"model.name": folder}))]
    batch = TEXTS.batch([0, 1, 2])
    found, plain = (b.engine.gradients(lambda b=b: b.losses(batch), 3).dense() for b in backbones)
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["deberta", "deberta-v3"])
def test_checkpointing_changes_no_gradient_of_shared_rows(kind, tiny, tmp_path):
    folder, grads = save_text_model(kind, tmp_path), []
    batch = TEXTS.batch([0, 1, 2])
    for again in (False, True):
        keys = {"model.checkpointing": again, "lora.targets": "all-linear"}
        backbone = randomised(tiny(**keys, **{"model.name": folder}))
        steps = backbone.engine.gradients(lambda b=backbone: b.losses(batch), 3)
        grads.append(steps.dense())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["opt"])
def test_rates_of_dropout_inside_of_a_layer_are_off_under_checkpointing(kind, tiny, tmp_path):
    folder = save_text_model(kind, tmp_path)
    backbone, _ = build(tiny(**{"model.name": folder, "model.checkpointing": True}))
    batch = TEXTS.batch([0, 1, 2])
    assert torch.equal(backbone.losses(batch), backbone.losses(batch))


def test_every_image_model_is_tested():
    assert set(IMAGE_MODELS) == {*IMAGES, *WIDE_IMAGES, "resnet"}


def test_the_page_of_models_names_the_targets():
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| ")]
    listed = {
        (library.strip(), frozenset(auto.strip(" `").split(","))) for _, library, auto in rows
    }
    for names in (AUTO | WIDE | IMAGES | WIDE_IMAGES).values():
        assert ("transformers", frozenset(names.split())) in listed
    for names in TIMM.values():
        assert ("timm", frozenset(names.split())) in listed
