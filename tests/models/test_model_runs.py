"""Test whole runs on images, and a private step of the models of the presets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_config, save_tokenizer
from helpers.app_runs import do_not_draw_the_report, do_not_wait_for_nodes
from helpers.fake_grid import FakeGrid
from helpers.model_checks import IMAGES, normalised, pixels, stock
from lalora_app import server_app
from lalora_app.adapter.factors import active_names, kind
from lalora_app.client.local_round import LocalSettings, apply, make_optimizer
from lalora_app.data.encoding import EncodedImages, EncodedTexts
from lalora_app.data.examples import split, with_classes
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.mechanism import poisson_batch
from lalora_app.private_step.step import RandomStreams, private_gradient
from lalora_app.settings.run_config import Config

INF = float("inf")


def finished(config: Config, monkeypatch) -> tuple[Path, dict]:
    """Run a federation of two clients; return its adapter's folder and its summary."""
    do_not_wait_for_nodes(monkeypatch)
    do_not_draw_the_report(monkeypatch)
    server_app.run(FakeGrid(config, 2), config)
    (folder,) = Path(config.output).iterdir()
    return folder / "adapter", json.loads((folder / "summary.json").read_text("utf-8"))


@pytest.mark.parametrize(("kind", "views"), [("swin", 1), ("hf-vit", 1), ("swin", 2)])
def test_a_run_on_images_ends_with_an_adapter_for_the_stock_model(
    kind, views, images, tiny_timm, tiny_vit, monkeypatch
):
    from peft import PeftModel

    rates = {"train.optimizer": "adamw", "train.lr-a": 0.01, "train.lr-b": 0.01}
    sizes = {"train.batch-size": 24, "train.local-steps": 6, "train.lr-head": 0.1}
    sizes |= {"train.views": views}
    repeatable = {"privacy.epsilon": INF, "privacy.noise": "seeded", "num-server-rounds": 2}
    config = images(kind, **rates, **sizes, **repeatable)
    adapter, summary = finished(config, monkeypatch)
    assert summary["status"] == "completed"

    folder = tiny_timm.get(kind, tiny_vit)
    model = PeftModel.from_pretrained(stock(kind, folder), adapter).eval()
    mean, std = ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]) if kind == "hf-vit" else ([0.4] * 3, [0.2] * 3)
    right, (_, test) = [], split(with_classes(config.data))
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
    local = LocalSettings(method, 1, 1, config.train, config.rule, 1.0)
    apply(backbone, make_optimizer(backbone, local, 0.0, {}), method.postprocess(noised))
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
