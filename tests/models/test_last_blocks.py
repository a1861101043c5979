"""``lora.layers``: adapters in the last blocks only, on the layers that PEFT's own rule selects."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from helpers.app_runs import open_run, run
from helpers.architectures import save_image_model, save_text_model
from helpers.model_checks import FUSED, PHASES, active, image_losses, refusal, text_losses
from helpers.oracle import assert_engine_is_right
from lalora_app.blocks.adapters import Targets, targets_in
from lalora_app.blocks.stack import Stack, find_stack
from lalora_app.models.backbone import Backbone, build

LAST = {"lora.layers": "last:1"}  # of two blocks
# architecture -> the list of its blocks
TEXT = {
    "bert": "bert.encoder.layer",
    "gpt2": "transformer.h",
    "deberta-v3": "deberta.encoder.layer",
}
WIDE_TEXT = {
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "modernbert": "model.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "gemma2": "model.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
    "mixtral": "model.layers",
}
IMAGES = {"vit": "vit.layers", "dinov2": "dinov2.encoder.layer"}
CASES = [
    *TEXT.items(),
    *(pytest.param(*case, marks=pytest.mark.wide) for case in WIDE_TEXT.items()),
]


def adapted_paths(backbone: Backbone) -> set[str]:
    names = [n for n in backbone.engine.parameters if ".lora_A." in n]
    return {n.removeprefix("base_model.model.").split(".lora_A.")[0] for n in names}


def selected_by_peft(settings, base: nn.Module) -> set[str]:
    """The layers that PEFT adapts on an unadapted model, by the saved config."""
    from peft import get_peft_model

    names = [n for n, _ in get_peft_model(base, settings).named_parameters() if ".lora_A." in n]
    return {n.removeprefix("base_model.model.").split(".lora_A.")[0] for n in names}


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize(("kind", "stack"), CASES)
@pytest.mark.usefixtures("wide_softmax")
def test_text_models_train_their_last_block_alone(kind, stack, targets, tiny, tmp_path):
    keys = {"model.name": save_text_model(kind, tmp_path), "lora.targets": targets}
    whole = adapted_paths(build(tiny(**keys))[0])
    backbone, _ = build(tiny(**keys | LAST))
    assert adapted_paths(backbone) == {p for p in whole if p.startswith(f"{stack}.1.")}
    assert backbone.targets == len(adapted_paths(backbone)) > 0
    (settings,) = backbone.model.peft_config.values()
    if targets == "auto":
        assert (settings.layers_to_transform, settings.layers_pattern) == (
            [1],
            stack.split(".")[-1],
        )
        assert not any(stack in name for name in settings.target_modules)
    assert_engine_is_right(active(backbone), text_losses, ways=FUSED, phases=PHASES)


@pytest.mark.parametrize(("kind", "stack"), IMAGES.items())
def test_image_models_of_transformers(kind, stack, images, tmp_path):
    backbone, _ = build(images(save_image_model(kind, tmp_path), **LAST))
    assert {p.rpartition(f"{stack}.1.")[1] for p in adapted_paths(backbone)} == {f"{stack}.1."}
    assert_engine_is_right(active(backbone), image_losses, ways=FUSED, phases=PHASES)


@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_models_of_timm_name_their_layers_by_path(kind, images):
    """PEFT finds a block's number behind a dot only, and ``blocks`` begins the path."""
    backbone, _ = build(images(kind, **LAST))
    paths = adapted_paths(backbone)
    assert paths
    assert all(path.startswith("blocks.1.") for path in paths)
    (settings,) = backbone.model.peft_config.values()
    assert set(settings.target_modules) == paths
    assert settings.layers_to_transform is None
    assert_engine_is_right(active(backbone), image_losses, ways=FUSED, phases=PHASES)


@pytest.mark.parametrize(
    "targets",
    [
        "query,dense",
        "attention.self.query",
        "bert.encoder.layer.1.attention.self.value",
        "query,bert.encoder.layer.1.attention.self.value",
        "output.dense",
    ],
)
def test_names_and_paths(targets, tiny, tiny_model):
    from transformers import AutoModelForSequenceClassification

    keys = {"lora.targets": targets}
    if targets == "query,dense":  # the head of this model has a layer of the same name
        keys |= {"model.pooling": "mean"}
    whole = adapted_paths(build(tiny(**keys))[0])
    backbone, _ = build(tiny(**keys | LAST))
    expected = {path for path in whole if path.startswith("bert.encoder.layer.1.")}
    assert adapted_paths(backbone) == expected
    (settings,) = backbone.model.peft_config.values()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    assert selected_by_peft(settings, base) == expected


def test_a_name_that_also_fits_a_head_selects_layers_of_the_last_block(tiny, tmp_path):
    folder = save_text_model("roberta", tmp_path)
    backbone, _ = build(tiny(**{"model.name": folder, "lora.targets": "dense"} | LAST))
    assert len(adapted_paths(backbone)) == 3
    assert all(p.startswith("roberta.encoder.layer.1.") for p in adapted_paths(backbone))


def test_all_blocks_by_number_are_all_layers(tiny):
    """Same tensors, bit for bit."""
    (_, whole), (_, counted) = (build(tiny(**{"lora.layers": v})) for v in ("all", "last:2"))
    assert whole.keys() == counted.keys()
    assert all(np.array_equal(whole[name], counted[name]) for name in whole)


def test_without_the_key_pefts_config_is_that_of_before(tiny, tmp_path):
    from peft import LoraConfig

    backbone, _ = build(tiny())
    backbone.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=2.0,
        target_modules=["query", "value"],
        modules_to_save=saved["modules_to_save"],
        base_model_name_or_path=saved["base_model_name_or_path"],
        inference_mode=True,
    ).save_pretrained(tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "adapter_config.json").read_text("utf-8"))
    for settings in (saved, plain):
        settings["target_modules"] = sorted(settings["target_modules"])
        settings["modules_to_save"] = sorted(settings["modules_to_save"])
    assert saved == plain | {"auto_mapping": saved["auto_mapping"]}


@pytest.mark.usefixtures("no_waiting", "no_report")
@pytest.mark.parametrize("method", ["la-lora", "flora"])
def test_a_whole_run_trains_the_last_block_alone(method, tiny):
    """Also with a base that moves: the saved adapter then has a larger rank."""
    done = run(tiny(**open_run(method=method) | LAST))
    layers = {name.split(".lora_")[0] for name in done.adapter if ".lora_" in name}
    assert {layer.removeprefix("base_model.model.") for layer in layers} == {
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.value",
    }
    assert any(done.adapter[name].any() for name in done.adapter if ".lora_B." in name)


# --- PEFT's rule ------------------------------------------------------------------------------


def test_paths_are_named_where_pefts_rule_selects_other_layers():
    def named(paths: list[str], *names: str, path: str = "m.layer") -> Targets:
        return targets_in(Stack(path, (nn.Identity(),) * 2), range(1, 2), list(names), paths)

    plain = ["m.layer.0.q", "m.layer.1.q"]
    assert named(plain, "q") == Targets(["m.layer.1.q"], ["q"], [1], "layer")
    by_path = Targets(["m.layer.1.q"], ["m.layer.1.q"])
    assert named([*plain, "other.layer.1.q"], "q") == by_path  # another list of the same name
    assert named(plain, "m.layer.0.q", "q") == by_path  # a path counts in any block
    assert named(["layer.0.q", "layer.1.q"], "q", path="layer") == Targets(
        ["layer.1.q"], ["layer.1.q"]
    )
    inner = ["m.layer.0.layer.1.q", "m.layer.1.layer.0.q"]
    assert named(inner, "q") == Targets(inner[1:], inner[1:])


# --- what has no single stack -----------------------------------------------------------------


class Block(nn.Module):
    """A block that may change the shape of its input."""

    def __init__(self, width: int = 4, out: int = 4):
        super().__init__()
        self.inner = nn.Linear(width, out)

    def forward(self, hidden_states):
        return self.inner(hidden_states)


def stack_of(blocks: list[nn.Module], order: list[int]) -> Stack | None:
    model = nn.Module()
    model.blocks = nn.ModuleList(blocks)

    def run() -> None:
        x = torch.zeros(1, 3, 4)
        for index in order:
            x = model.blocks[index](hidden_states=x)

    return find_stack(model, run)


def test_blocks_compute_once_in_order_and_keep_the_shape():
    found = stack_of([Block(), Block()], [0, 1])
    assert found is not None
    assert (found.path, found.block_of("blocks.1.inner"), found.block_of("head")) == (
        "blocks",
        1,
        None,
    )
    assert stack_of([Block()], [0]) is not None
    for order in ([1, 0], [0, 0], [0], [0, 1, 0]):
        assert stack_of([Block(), Block()], order) is None, order
    assert stack_of([Block(4, 8), Block(8, 8)], [0, 1]) is None
    assert stack_of([nn.Linear(4, 4), nn.Linear(4, 4)], []) is None  # layers, and no blocks


@pytest.mark.parametrize("kind", ["albert", "t5"])
def test_a_text_model_without_a_single_stack_is_one_line(kind, tiny, tmp_path):
    folder = save_text_model(kind, tmp_path)
    assert refusal(tiny(**{"model.name": folder} | LAST)) == (
        f'lora.layers="last:1" must be "all" for model.name="{folder}": it has no single stack of '
        "equal blocks, such as the layers of BERT; Swin and ConvNeXt have several, and ALBERT "
        "calls one block several times"
    )


@pytest.mark.parametrize("kind", ["swin", "swinv2", "convnext"])
def test_an_image_model_of_several_stages_is_one_line(kind, images, tmp_path):
    assert refusal(images(kind, **LAST)).startswith('lora.layers="last:1" must be "all" for ')
    line = refusal(images(save_image_model(kind, tmp_path), **LAST))
    assert line.startswith('lora.layers="last:1" must be "all" for model.name=')


def test_more_blocks_than_the_model_has_are_one_line(tiny, tiny_model):
    assert refusal(tiny(**{"lora.layers": "last:3"})) == (
        f'lora.layers="last:3" must be at most "last:2", the number of blocks of '
        f'model.name="{tiny_model}"'
    )


def test_targets_below_the_last_blocks_are_one_line(tiny):
    path = "bert.encoder.layer.0.attention.self.query"
    start = 'must name Linear layers of the blocks bert.encoder.layer.1 for lora.layers="last:1"'
    assert refusal(tiny(**{"lora.targets": path} | LAST)) == (
        f'lora.targets="{path}" {start}, and "{path}" names none'
    )
    line = refusal(tiny(**{"lora.targets": f"value,{path}"} | LAST))
    assert line == f'lora.targets="value,{path}" {start}, and "{path}" names none'
