"""Whole runs of the less usual architectures, and their adapters on the stock models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from conftest import save_tokenizer
from helpers.app_runs import do_not_draw_the_report, do_not_wait_for_nodes
from helpers.architectures import save_text_model
from helpers.fake_grid import FakeGrid
from helpers.model_checks import normalised
from helpers.model_checks import stock as stock_image_model
from lalora_app import server_app
from lalora_app.data.examples import split, with_classes
from lalora_app.models.backbone import build
from lalora_app.settings.run_config import Config

# peft, of an adapter for Linear layers on stock GPT-2's Conv1D: what it then does is right
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
TEXT = ["deberta-v3", "modernbert", "albert", "gpt2-without-padding"]
TIMM = ["swinv2", "beit", "convnext"]


@pytest.fixture
def a_run(tiny, images, tmp_path):
    """Config factory of a run of two rounds, one step each; private on texts."""

    def make(kind: str) -> Config:
        # one budget, so that the accountant calibrates once
        epsilon = float("inf") if kind in TIMM else 8.0
        budget = {"privacy.epsilon": epsilon, "privacy.delta": 1e-3, "train.local-steps": 1}
        rates = {"train.optimizer": "adamw", "train.lr-a": 0.05, "train.lr-b": 0.05}
        keys = budget | rates | {"num-server-rounds": 2, "method": "dp-lora"}
        if kind in TIMM:
            return images(kind, **keys)
        folder = tmp_path / "model"
        name = save_text_model(kind.removesuffix("-without-padding"), folder)
        if kind.endswith("-without-padding"):
            save_tokenizer(folder, pad_token=None, eos_token="[SEP]")
        return tiny(**keys | {"model.name": name})

    return make


def stock_model(kind: str, folder: str) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    if kind in TIMM:
        return stock_image_model(kind, folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    base.config.pad_token_id = base.config.pad_token_id or 3  # of GPT-2, as its users must set it
    return base


def stock_logits(model: nn.Module, batch, config: Config) -> Tensor:
    if config.model.task == "image-classification":
        return model(normalised(batch.inputs, [0.4] * 3, [0.2] * 3))
    return model(input_ids=batch.inputs, attention_mask=batch.mask).logits


@pytest.mark.parametrize("kind", [*TEXT, *TIMM])
def test_a_run_ends_with_an_adapter_for_the_stock_model(kind, a_run, monkeypatch):
    from peft import PeftModel

    config = a_run(kind)
    do_not_wait_for_nodes(monkeypatch)
    do_not_draw_the_report(monkeypatch)
    server_app.run(FakeGrid(config, 2), config)
    (folder,) = Path(config.output).iterdir()
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["status"] == "completed"

    backbone, _ = build(config)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(array.any() for name, array in adapter.items())  # B is no longer zero
    backbone.load(adapter)
    batch = backbone.encode(split(with_classes(config.data))[1]).batch(range(4))
    plain = stock_model(kind, config.model.name.removeprefix("timm:")).eval()
    with torch.no_grad():
        before = stock_logits(plain, batch, config)
        model = PeftModel.from_pretrained(plain, folder / "adapter").eval()
        theirs = stock_logits(model, batch, config)
        torch.testing.assert_close(theirs, backbone.logits(batch), rtol=1e-4, atol=1e-5)
    assert (theirs - before).abs().max() > 1e-3
