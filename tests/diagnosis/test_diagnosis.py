"""A finished run opened again: plain weights that compute the same, and its diagnostics."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.app_runs import open_run as without_budget
from helpers.app_runs import run, tokens_of
from lalora_app.adapter.factors import kind
from lalora_app.cli import main
from lalora_app.data.examples import split
from lalora_app.diagnosis.report import intruders, sharpness, weights
from lalora_app.diagnosis.spectra import intruder_dimensions
from lalora_app.results.merge import merge
from lalora_app.results.opened_run import open_run

pytestmark = [pytest.mark.wide, pytest.mark.usefixtures("no_waiting", "no_report")]

RATES = {"train.lr-a": 0.05, "train.lr-b": 0.05, "train.lr-w": 0.05, "train.batch-size": 60}


@pytest.fixture(params=["dp-lora", "fedex-lora", "beamlora", "full"])
def done(tiny, request):
    return run(tiny(**without_budget(method=request.param) | RATES))


def test_merged_weights_load_without_peft_and_compute_the_same(done, tmp_path):
    from transformers import AutoModelForSequenceClassification

    merge(done.folder.path, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    config, model, _ = open_run(done.folder.path)
    inputs, _ = tokens_of(config, 1)
    examples = model.encode(split(config.data)[1])
    with torch.no_grad():
        logits = model.logits(examples.batch(range(len(examples))))
        assert torch.allclose(plain(**inputs).logits, logits, atol=1e-4)
    names = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("lora" in name for name in names)


def test_intruders_are_those_of_the_dense_weights(done):
    _, model, state = open_run(done.folder.path)
    found = intruders(weights(model, state))
    assert len(found) == 4  # query and value of two layers
    for name in model.frozen_weights.names:
        count = found[name.rsplit(".lora_", 1)[0]]
        layer = model.frozen_weights._layers[name]
        if kind(name) == "W":
            base = layer.base_layer.weight.detach().double().numpy()
            assert count == intruder_dimensions(base, base + state.adapter[name])
            continue
        a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        own = layer.base_layer.weight.detach().double()
        moved = state.drift and state.drift[name] @ state.drift[name.replace("_B", "_A")]
        base = own.numpy() - (np.asarray(moved, np.float64) if state.drift else 0.0)
        adapted = (own + layer.scaling["default"] * b @ a).numpy()
        assert count == intruder_dimensions(base, adapted)


def test_sharpness_is_finite_and_the_same_twice(done):
    config, model, _ = open_run(done.folder.path)
    assert sharpness(config, model) == pytest.approx(sharpness(config, model), rel=1e-3)


def test_the_commands_say_what_they_found(done, tmp_path, capsys):
    assert main.main(["diagnose", str(done.folder.path)]) == 0
    out = capsys.readouterr().out
    assert "intruder dimensions" in out
    assert "top Hessian eigenvalue" in out
    assert main.main(["diagnose", str(done.folder.path), str(done.folder.path)]) == 0
    title = f"{done.folder.name}, method {done.config.method}, epsilon inf\n"
    assert capsys.readouterr().out == f"{title}{out}\n{title}{out}"
    keys = ["--second-task", "data.test-fraction=0.5"]
    assert main.main(["diagnose", str(done.folder.path), *keys]) == 2
    assert "--second-task must name the dataset: data.name" in capsys.readouterr().err
    keys[1] = "data.name=demo"
    assert main.main(["diagnose", str(done.folder.path), *keys]) == 2
    assert "--second-task 'data.name=demo' must be TOML, strings in q" in capsys.readouterr().err
    keys[1] = f'data.name="{done.config.data.name}"'
    file = tmp_path / "s.svg"
    folders = [str(done.folder.path)] * 2
    assert main.main(["diagnose", *folders, *keys, "--picture", str(file)]) == 0
    assert capsys.readouterr().out.count("linear probe of the second task  accuracy ") == 2
    assert file.read_text("utf-8").startswith("<svg role=")
    assert main.main(["diagnose", *folders, "--picture", str(tmp_path / "none" / "s.svg")]) == 2
    assert "must be in a folder that exists" in capsys.readouterr().err
    assert main.main(["merge", str(done.folder.path), str(tmp_path / "m")]) == 0
    assert main.main(["diagnose", str(tmp_path)]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
