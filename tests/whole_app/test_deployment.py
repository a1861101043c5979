"""docs/deployment.md, executed as written: SuperLink, three SuperNodes, TLS, keys, on loopback.

One federation for all tests here, because it takes a minute to bring up. The model is the tests'
tiny one; LALORA_DEPLOYMENT_MODEL=default takes the guide's own run configs and their MiniLM.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from conftest import ROOT
from lalora_app.cli.credentials import make_ca, make_node
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.ledger import Ledger

sys.path.insert(0, str(ROOT / "benchmarks"))

import random_kills
from guide import Guide, blocks, execute, free_ports, guide

UNITS = sorted((ROOT / "deploy").glob("*.service"))
DEFAULT_MODEL = os.environ.get("LALORA_DEPLOYMENT_MODEL") == "default"
KILL_ROUNDS = 6
LIMITS = {"site-0": 8.0, "site-1": 6.0, "site-2": 4.0}  # as the guide has them


def written(path: Path, values: dict) -> str:
    random_kills.write(path, values)
    return str(path)


@pytest.fixture(scope="module")
def tiny_keys(tiny_model, tiny_data) -> dict:
    return {
        "min-clients": 3,
        "model.name": tiny_model,
        "model.pooling": "model",
        "model.max-length": 12,
        "data.name": tiny_data,
        "train.local-steps": 2,
        "train.batch-size": 8,
    }


@dataclass
class Executed:
    """The guide after its last block, its SuperNodes still at work."""

    guide: Guide
    rounds: int

    def runs(self) -> list[Path]:
        found = (self.guide.folder / "lalora-results").glob("*/summary.json")
        return sorted((path.parent for path in found), key=lambda path: path.stat().st_mtime)


def _executed(made: Guide, rounds: int) -> Executed:
    for _ in execute(made):
        pass
    return Executed(made, rounds)


@pytest.fixture(scope="module")
def executed(tmp_path_factory, tiny_keys) -> Iterator[Executed]:
    folder = tmp_path_factory.mktemp("deployment")
    variables = {"LALORA_TIMING": "1"}
    if not DEFAULT_MODEL:
        seeded = {"privacy.noise": "seeded", "min-replies": 3, "num-server-rounds": 4}
        mixed = {"method": "flexlora", "min-replies": 2, "num-server-rounds": 2}
        variables["MODEL"] = tiny_keys["model.name"]
        variables["REHEARSAL"] = written(folder / "rehearsal.toml", tiny_keys | seeded)
        variables["FIRST_RUN"] = written(folder / "first.toml", tiny_keys | mixed)
    with guide(folder / "machine", **variables) as made:
        yield _executed(made, rounds=4)


# --- the guide and the examples, without running them -----------------------------------------


def test_the_guide_has_every_kind_of_block_and_no_unknown_one():
    kinds = [(block.kind, block.name) for block in blocks()]
    assert kinds[0] == ("environment", "")
    assert {kind for kind, _ in kinds} == {"environment", "run", "service"}
    services = [name for kind, name in kinds if kind == "service"]
    sites = ["site-0", "site-1", "site-2"]
    assert services == ["superlink", *sites, *sites]
    assert {name for kind, name in kinds if kind == "run"} == {
        *("", "rehearsal", "comparison", "private")
    }


def test_a_block_that_fails_is_told_with_its_log_and_goes_no_further(tmp_path):
    with guide(tmp_path) as made:
        with pytest.raises(RuntimeError, match="exit code 1 of"):
            made.run("echo $((40 + 2))\nfalse\necho $((40 + 3))")
        assert made.log("commands").splitlines() == ["42"]


def test_what_a_guide_starts_ends_with_it(tmp_path):
    with guide(tmp_path) as made:
        made.start("sleeper", "sleep 600 & sleep 600")
        pid = made.services["sleeper"].pid
        assert Path(f"/proc/{pid}").exists()
    assert made.processes() == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_units(unit, tmp_path):
    text = unit.read_text("utf-8").replace("/opt/lalora/bin", str(Path(sys.executable).parent))
    for name, content in ((unit.name, text), (f"broken-{unit.name}", text + "NoSuchKey=1\n")):
        (tmp_path / name).write_text(content, "utf-8")
    said = {
        name: subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=False,
        )
        for name in (unit.name, f"broken-{unit.name}")
    }
    good, broken = said.values()
    assert (good.returncode, good.stderr) == (0, "")
    assert "NoSuchKey" in broken.stderr  # the command does look


# --- the federation ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.deployment
@pytest.mark.timeout(1800)
def test_the_rehearsal_ends_with_the_adapter_of_the_simulation(executed):
    deployed, simulated, _ = executed.runs()
    file = "adapter/adapter_model.safetensors"
    one, other = load_file(deployed / file), load_file(simulated / file)
    assert set(one) == set(other)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    rows = [json.loads(line) for line in (deployed / "history.jsonl").read_text().splitlines()]
    assert [row["replies"] for row in rows] == [3] * executed.rounds
    assert all(row["aggregated"] for row in rows)


@pytest.mark.slow
@pytest.mark.deployment
@pytest.mark.timeout(1800)
def test_the_private_run_keeps_every_sites_own_limit(executed):
    summary = json.loads((executed.runs()[2] / "summary.json").read_text("utf-8"))
    assert (summary["status"], summary["method"]) == ("completed", "flexlora")
    for site, limit in LIMITS.items():
        entries = Ledger(executed.guide.state / site / "state/ledger.sqlite").entries()
        assert {entry.dataset for entry in entries} == {"messages of 2026"}
        assert [entry.round for entry in entries] == [1, 2]
        assert 0 < epsilon([entry.release for entry in entries], 1e-5) <= limit


def stranger(made: Guide, ca: Path, key: Path) -> str:
    """Run a SuperNode with its own CA file and key to its end; return its log."""
    (port,) = free_ports(1)
    command = f'flower-supernode --superlink "$HOST:$PORT" --port {port} --max-retries 1'
    text = f'{command} --root-certificates "{ca}" --auth-supernode-private-key "{key}"'
    with pytest.raises(RuntimeError, match="exit code 1 of"):
        made.run(text, log=f"stranger-{key.name}", timeout=300)
    return made.log(f"stranger-{key.name}")


@pytest.mark.slow
@pytest.mark.deployment
@pytest.mark.timeout(1800)
def test_a_key_that_was_not_registered_is_refused(executed, tmp_path):
    make_node(tmp_path, "unknown")
    said = stranger(executed.guide, executed.guide.state / "server/ca.crt", tmp_path / "unknown")
    assert "Exit Code: 305" in said  # Flower's: the SuperLink does not take this node
    assert "SuperNode ID" not in said


@pytest.mark.slow
@pytest.mark.deployment
@pytest.mark.timeout(1800)
def test_a_site_with_another_ca_does_not_talk_to_the_server(executed, tmp_path):
    make_ca(tmp_path)
    # A registered key: what fails is the server's certificate, before anything is sent.
    said = stranger(executed.guide, tmp_path / "ca.crt", executed.guide.state / "site-0/site-0")
    assert "certificate verify failed" in said.lower()
    assert "SuperNode ID" not in said


@pytest.mark.slow
@pytest.mark.deployment
@pytest.mark.timeout(1800)
def test_a_killed_client_site_and_server_cost_no_ledger_a_release(executed, tiny_keys):
    made, chance = executed.guide, random.Random(0)
    own = {"min-clients": 3} if DEFAULT_MODEL else tiny_keys  # site-0's policy names the model
    keys = own | {"min-replies": 1, "num-server-rounds": KILL_ROUNDS, "method": "flexlora"}
    run = random_kills.Submission(made, keys, begun=set(executed.runs()))
    with random_kills.Supervisor(made):
        killed = [random_kills.kill_one(made, run, kind, chance) for kind in random_kills.VICTIMS]
        assert random_kills.finish(run, 400)
    assert [line["kind"] for line in killed] == list(random_kills.VICTIMS)
    assert run.submitted > 1  # the ServerApp was killed, and the run resumed
    for site, found in random_kills.ledgers(made).items():
        assert found["drawn_at_least"] > 0, (site, found)  # else there is nothing to compare
        assert not found["under_reported"], (site, found)
        assert found["verified"], (site, found)
