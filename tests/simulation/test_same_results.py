"""Both engines give the same run, byte for byte, where noise is seeded and each process has one
thread: adapter, history and ledger."""

import json
from dataclasses import astuple
from pathlib import Path

import pytest

from helpers.simulation_runs import run_toml
from lalora_app.privacy.ledger import Ledger

CASES = {
    "la-lora": {"method": "la-lora"},
    "rolora, half of the clients": {"method": "rolora", "fraction-train": 0.5},
    "flora, mixed ranks": {"method": "flora", "lora.ranks": "2,1"},
    "secure aggregation": {"method": "la-lora", "secure-aggregation": "secagg+"},
}
CLOCKED = ("seconds", "elapsed")  # columns of the history


def history(folder: Path) -> list[dict]:
    lines = (folder / "history.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: row[key] for key in row if key not in CLOCKED} for row in rows]


def releases(home: Path) -> list[tuple]:
    """The entries of all clients, without the clock, the name of the run and random ids."""
    entries = Ledger(home / "ledger.sqlite").entries()
    return sorted((entry.dataset, entry.round, *astuple(entry.release)) for entry in entries)


@pytest.mark.slow
@pytest.mark.quiet
@pytest.mark.parametrize("case", list(CASES))
def test_both_engines_give_the_same_bytes(case, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = {}
    for engine in ("local", "flower"):
        monkeypatch.setenv("LALORA_HOME", str(tmp_path / f"home-{engine}"))
        output = tmp_path / engine
        seeded = {"privacy.noise": "seeded", "num-server-rounds": 3, "output": str(output)}
        assert run_toml(tiny(**CASES[case] | seeded), tmp_path, engine, nodes=4) == 0
        (folder,) = output.iterdir()
        adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        found[engine] = adapter, history(folder), releases(tmp_path / f"home-{engine}")
    assert found["local"] == found["flower"]
    assert len(found["local"][1]) == 3
    assert len(found["local"][2]) == (6 if "half" in case else 12)
