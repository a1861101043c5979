"""benchmarks/gpu.py: all parts run small on a CPU without Ray and network, and its gates."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

from conftest import ROOT, WORDS

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
from gpu_parts import memory, part_file, tables
from gpu_parts.gates import GATES, Gate
from gpu_parts.settings import Settings, Unit

PARTS = ("correctness", "steps", "memory", "rounds", "study")
BARE = """
import importlib.machinery, os, socket

find, connect = importlib.machinery.PathFinder.find_spec, socket.socket.connect


def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] == "ray" else find(name, path, target)


def refuse(self, address):
    if self.family == socket.AF_UNIX:
        return connect(self, address)
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{address}\\n")
    raise OSError("no network")


importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
socket.socket.connect = refuse
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory, tiny_model) -> Path:
    """A folder as ../shared, with a tiny model and few sentences."""
    folder = tmp_path_factory.mktemp("assets")
    shutil.copytree(tiny_model, folder / "models" / "minilm-l6-h384")
    data = folder / "data" / "sst2"
    data.mkdir(parents=True)
    for split, count in {"train": 200, "validation": 20}.items():
        rows = {
            "sentence": [f"{WORDS[5 + i % 10]} {WORDS[6 + i % 9]} {i}" for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        Dataset.from_dict(rows).to_parquet(data / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, assets) -> Path:
    """The results of the whole command, where Ray is not installed and nothing can be called."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(BARE, "utf-8")
    env = os.environ | {"PYTHONPATH": str(folder), "CALLS": str(folder / "calls")}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(folder / "out")]
    command += ["--device", "cpu", "--quick", "--assets", str(assets), "--minutes", "20"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (folder / "calls").exists(), (folder / "calls").read_text("utf-8")
    return folder / "out"


def content(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_runs_small_on_a_cpu_without_ray_and_network(finished):
    for part in PARTS:
        found = content(finished, part)
        assert found["status"] == "complete"
        assert found["rows"]
        assert (found["missing"], found["errors"]) == ([], {})
    steps = content(finished, "steps")["rows"]
    assert {row["variant"] for row in steps if "error" not in row} >= {
        *("peft", "fused", "merged", "opacus-ghost", "peft-compiled", "compiled")
    }
    assert [row["clients"] for row in content(finished, "rounds")["rows"]] == [8, 20]
    (run,) = content(finished, "study")["rows"]
    assert (run["rounds"], run["status"]) == (2, "completed")
    assert 0 < run["epsilon_max"] <= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_gates_are_those_of_the_rows(finished):
    summary, steps = content(finished, "summary"), content(finished, "steps")["rows"]
    found = {gate["gate"]: gate for gate in summary["gates"]}
    fused = [row for row in steps if row["variant"] == "fused" and "wall_ratio" in row]
    compiled = [row for row in steps if row["variant"] == "compiled"]
    (eight,) = (row for row in content(finished, "rounds")["rows"] if row["clients"] == 8)
    expected = {
        "time of fused / stock PEFT": max(row["wall_ratio"] for row in fused),
        "time of compiled / compiled PEFT": compiled[0]["wall_to_compiled_peft"],
        "peak memory of fused / stock PEFT": max(row["peak_ratio"] for row in fused),
        "share of training in a round of 8 clients": eight["training_share"],
    }
    assert {name: found[name]["value"] for name in expected} == expected
    assert all((found[name]["met"] is True or found[name]["met"] is False) for name in expected)
    assert 0 < eight["training_share"] <= 1
    assert eight["training_s"] <= eight["round_s"]
    page = tables.page(finished)
    assert all(f"### {title}\n\n|" in page for title, _, _ in tables.TABLES)


UPPER = Gate("time", "steps", {"variant": "fused"}, "ratio", 1.05)
LOWER = Gate("share", "rounds", {"clients": 8}, "share", 0.9, at_most=False)


def ratios(*values: float | None) -> list[dict]:
    other = {"variant": "plain", "ratio": 9.0}
    return [other, *({"variant": "fused", "ratio": value, "batch": 64} for value in values)]


@pytest.mark.parametrize(
    ("gate", "rows", "value", "met"),
    [
        (UPPER, ratios(0.9, 1.05), 1.05, True),
        (UPPER, ratios(0.9, 1.06, None), 1.06, False),
        (UPPER, ratios(None), None, None),
        (UPPER, [], None, None),
        (LOWER, [{"clients": 8, "share": 0.9}, {"clients": 100, "share": 0.1}], 0.9, True),
        (LOWER, [{"clients": 8, "share": 0.95}, {"clients": 8, "share": 0.89}], 0.89, False),
        (LOWER, [{"clients": 8, "share": 0.0}], 0.0, False),
    ],
)
def test_a_gate_is_the_worst_value_of_its_rows(gate, rows, value, met):
    found = gate.outcome(rows)
    assert (found["value"], found["met"]) == (value, met)


def test_the_gates_have_the_required_bounds():
    assert [(gate.part, gate.bound, gate.at_most) for gate in GATES] == [
        ("steps", 1.05, True),
        ("steps", 1.03, True),
        ("steps", 1.05, True),
        ("steps", 1.05, True),
        ("rounds", 0.9, False),
    ]


def test_a_unit_that_fails_leaves_its_traceback_and_the_next_one_runs(tmp_path):
    def broken():
        yield {"value": 1}
        raise ValueError("no such layer")

    units = [Unit("first", broken), Unit("second", lambda: [{"value": 2, "ok": True}])]
    assert not part_file.run_part(tmp_path / "part.json", units)
    found = content(tmp_path, "part")
    assert found["rows"] == [{"value": 1}, {"value": 2, "ok": True}]
    assert list(found["errors"]) == ["first"]
    assert "ValueError: no such layer" in found["errors"]["first"]
    assert (found["status"], found["missing"]) == ("failed", [])


def test_a_wrong_row_fails_its_part(tmp_path):
    assert not part_file.run_part(tmp_path / "part.json", [Unit("one", lambda: [{"ok": False}])])
    assert content(tmp_path, "part")["reason"].startswith("1 rows are wrong")


def test_rows_are_on_disk_before_the_next_one_is_measured(tmp_path):
    seen = []

    def rows():
        yield {"value": 1}
        seen.append(content(tmp_path, "part"))

    assert part_file.run_part(tmp_path / "part.json", [Unit("one", rows)])
    assert (seen[0]["rows"], seen[0]["missing"]) == ([{"value": 1}], ["one"])


def scripted(monkeypatch, scripts: dict[str, str]) -> None:
    """Let each part run a script in place of its measurements; FILE is the part's file."""

    def command(part, settings):
        file = settings.out / f"{part}.json"
        return [sys.executable, "-c", f"FILE = {str(file)!r}\n{scripts[part]}"]

    monkeypatch.setattr(gpu, "_command", command)
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0.0)


WRITES = "import json; json.dump({}, open(FILE, 'w'))"


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_next_one(tmp_path, monkeypatch):
    complete = WRITES.format('{"status": "complete", "rows": [{"clients": 8}]}')
    slow = WRITES.format('{"status": "running", "missing": ["b"], "rows": [{"kind": "a"}]}')
    scripts = {
        "correctness": "raise SystemExit(3)",
        "steps": f"{slow}\nimport time; time.sleep(60)",
        "memory": complete,
        "rounds": complete,
    }
    scripted(monkeypatch, scripts)
    began = time.monotonic()
    assert not gpu.run_all(Settings(tmp_path, "cpu", quick=True), minutes=0.2)
    assert time.monotonic() - began < 20
    parts = content(tmp_path, "summary")["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "correctness": "failed",
        "steps": "cut short",
        "memory": "complete",
        "rounds": "complete",
        "study": "skipped",
    }
    assert parts["correctness"]["reason"] == "its process ended with the exit code 3"
    assert parts["steps"]["missing"] == ["b"]
    assert content(tmp_path, "steps")["rows"] == [{"kind": "a"}]
    assert parts["study"]["reason"] == "no --assets"


def test_parts_without_time_are_told_as_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 10.0)
    assert gpu.run_all(Settings(tmp_path, "cpu", quick=True), minutes=0.01)
    parts = content(tmp_path, "summary")["parts"]
    assert {part["status"] for part in parts.values()} == {"skipped"}
    assert parts["steps"]["reason"] == "0 s were left for it"


def test_a_gpu_that_is_not_there_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(
        "--device cuda: nvidia-smi finds no GPU; --device cpu tries the command\n"
    )


@pytest.mark.parametrize("limit", [0, 1, 2, 15, 16, 17, 100, 1023])
def test_the_largest_batch_is_found_to_a_sixteenth(limit):
    tried = []

    def fits(examples: int) -> bool:
        tried.append(examples)
        return examples <= limit

    found = memory.largest(fits, 16)
    assert found <= limit <= found + max(1, found // 16)
    assert len(tried) <= 16
