"""Shared noise between four SuperNodes that pin each other, with TLS, on loopback.

One federation for all tests here. Its run loses one site in each of the two waves of messages. Then
the server registers a client of its own, and asks all five for another run.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.ledger import Ledger
from lalora_app.privacy.ledger_entries import LedgerEntry
from lalora_app.secagg.peers import public_text
from lalora_app.site_files.peer_key import make_peer_key
from lalora_app.wire.refusals import REFUSALS

sys.path.insert(0, str(ROOT / "benchmarks"))

import random_kills
from guide import Guide, guide, until

pytestmark = [pytest.mark.slow, pytest.mark.deployment, pytest.mark.timeout(2400)]

SITES, ROUNDS = [f"site-{i}" for i in range(4)], 9
STRANGER = "site-4"  # made by the server; no site has pinned it
EPSILON, LIMIT, LIMIT_ALONE = 8.0, 9.0, 60.0
DELTA = 1e-5
IN_WAVE_1, IN_WAVE_2 = "site-0", "site-1"  # the sites that are killed


@dataclass
class Federation:
    """The deployment with its run of shared noise.

    Attributes:
        made: the SuperLink and the SuperNodes.
        keys: keys of the run config.
        rows: the history of the run that lost two sites.
        killed: the attempt in which each site was killed.
    """

    made: Guide
    keys: dict[str, object]
    rows: list[dict]
    killed: dict[str, int]

    def entries(self, site: str) -> list[LedgerEntry]:
        """Return the releases in a site's ledger; none if it has no ledger."""
        path = self.made.state / site / "state" / "ledger.sqlite"
        return Ledger(path).entries() if path.exists() else []


def port_of(site: str) -> str:
    """Return the name of the variable with the port of a site's SuperNode."""
    return "PORT_" + site.removeprefix("site-")


def start_site(made: Guide, site: str) -> None:
    """Start the SuperNode of a site with its data, its policy and its signing key."""
    own = f"$DEPLOY/{site}"
    node = (
        f"name='{site}' dataset-id='{site}' data-path='$DEPLOY/data/{site}.jsonl' "
        f"state-path='{own}/state' policy='{own}/policy.toml' peer-key='{own}/peer.pem'"
    )
    made.start(
        site,
        f'OMP_NUM_THREADS=1 FLWR_HOME="{own}/flwr" flower-supernode --superlink "$HOST:$PORT" '
        f'--port "${port_of(site)}" --root-certificates "$DEPLOY/server/ca.crt" '
        f'--auth-supernode-private-key "{own}/{site}" --node-config "{node}"',
    )


def write_keys_and_policies(made: Guide) -> None:
    """Make the keys of all sites; each of the four pins the signing keys of the other three."""
    for site in (*SITES, STRANGER):
        made.run(f'lalora credentials node "$DEPLOY/{site}" {site}')
    keys = {site: make_peer_key(made.state / site / "peer.pem") for site in (*SITES, STRANGER)}
    for site in keys:
        others = ", ".join(f'"{public_text(keys[s])}"' for s in SITES if s != site)
        (made.state / site / "policy.toml").write_text(
            f"max-epsilon = {LIMIT}\ndelta = {DELTA}\n[shared-noise]\n"
            f"max-epsilon-alone = {LIMIT_ALONE}\npeers = [{others}]\n",
            "utf-8",
        )


def start_everything(made: Guide, data: Path) -> None:
    """Start the SuperLink as docs/deployment.md does, and the four sites; register all five."""
    named = {block.name: block.text for block in made.blocks if block.kind == "service"}
    (credentials,) = (b.text for b in made.blocks if "credentials ca" in b.text)
    (registration,) = (b.text for b in made.blocks if "supernode register" in b.text)
    made.run(credentials)
    write_keys_and_policies(made)
    rows = data.read_text("utf-8").splitlines(keepends=True)
    (made.state / "data").mkdir()
    for number, site in enumerate((*SITES, STRANGER)):
        part = rows[number :: len(SITES) + 1]
        (made.state / "data" / f"{site}.jsonl").write_text("".join(part), "utf-8")
    made.start("superlink", named["superlink"])
    made.ready()
    made.run(registration)
    for site in ("site-3", STRANGER):
        made.run(f'flwr supernode register "$DEPLOY/{site}/{site}.pub" deployment')
    for site in SITES:
        start_site(made, site)
    made.ready()


def attempts(run: random_kills.Submission) -> list[dict]:
    """Return the history of a run so far."""
    folder = run.folder()
    file = folder / "history.jsonl" if folder else None
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def trained(made: Guide, attempt: int) -> set[str]:
    """Return the sites whose logs show the end of their training of an attempt."""
    return {site for site in SITES if f"LaLoRA timing {attempt} " in made.log(site)}


def client_apps(made: Guide, site: str) -> set[int]:
    """Return the processes that answer a message at a site."""
    port = ":" + made.environment[port_of(site)]
    found = random_kills.live(made, "flwr-clientapp")
    return {p.pid for p in found if port in " ".join(p.info["cmdline"] or [])}


def soon(true: Callable[[], object], moment: str) -> None:
    """Wait for a moment that may be short."""
    deadline = time.monotonic() + 300
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {moment} after 300 s")
        time.sleep(0.05)


def kill_while(made: Guide, site: str, true: Callable[[], object], moment: str) -> None:
    """End a SuperNode and the process of its message with SIGKILL at a moment."""
    soon(true, f"{site}: {moment}")
    apps = client_apps(made, site)
    os.killpg(made.services[site].pid, signal.SIGKILL)  # the supervisor starts it again
    for process in random_kills.live(made, "flwr-clientapp"):
        if process.pid in apps:
            process.kill()


def next_whole_attempt(run: random_kills.Submission, after: int) -> int:
    """Wait for an attempt with all four sites; return the number of the attempt that follows."""

    def whole() -> bool:
        rows = attempts(run)
        return bool(rows) and len(rows) > after and rows[-1]["replies"] == len(SITES)

    until(whole, 600, "an attempt with all four sites")
    return len(attempts(run)) + 1


def lose_two_sites(made: Guide, run: random_kills.Submission, fed: Federation) -> dict[str, int]:
    """Kill one site while it trains and another while it unmasks; restart both.

    Returns:
        The attempt in which each site was killed.
    """
    first = next_whole_attempt(run, 0)
    spent = len(fed.entries(IN_WAVE_1))
    kill_while(made, IN_WAVE_1, lambda: len(fed.entries(IN_WAVE_1)) > spent, "training")
    second = next_whole_attempt(run, first)
    soon(lambda: IN_WAVE_2 in trained(made, second), f"{IN_WAVE_2}: training")
    first_wave = client_apps(made, IN_WAVE_2)  # each message has a process of its own
    kill_while(made, IN_WAVE_2, lambda: client_apps(made, IN_WAVE_2) - first_wave, "unmasking")
    return {IN_WAVE_1: first, IN_WAVE_2: second}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_model, tiny_data) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("shared-deployment")
    keys = {
        "method": "rolora",
        "secure-aggregation": "secagg+",
        "min-clients": len(SITES),
        "min-replies": len(SITES) - 1,
        "num-server-rounds": ROUNDS,
        "round-timeout": 90.0,
        "model.name": tiny_model,
        "model.pooling": "model",
        "model.max-length": 12,
        "privacy.noise-share": "sum",
        "privacy.epsilon": EPSILON,
        "train.local-steps": 1,
        "train.sampling-rate": 0.1,
        "train.union-size": 320,
        "train.optimizer": "sgd",
    }
    with guide(folder / "machine", LALORA_TIMING="1") as made:
        start_everything(made, Path(tiny_data))
        federation = Federation(made, keys, [], {})
        run = random_kills.Submission(made, keys)
        with random_kills.Supervisor(made):
            run.submit()
            federation.killed = lose_two_sites(made, run, federation)
            until(run.done, 900, "the end of the run")
        federation.rows = attempts(run)
        yield federation


def reasons(federation: Federation, site: str) -> str:
    """Return why replies were not used in the attempt in which a site was killed."""
    return " ".join(federation.rows[federation.killed[site] - 1]["dropped"])


def test_the_run_completes_without_the_site_killed_in_each_wave(federation):
    rows = federation.rows
    assert len(rows) == ROUNDS
    assert all(row["aggregated"] for row in rows)
    replies = [row["replies"] for row in rows]
    assert replies[federation.killed[IN_WAVE_1] - 1] == 3  # its gradient did not arrive
    assert replies[federation.killed[IN_WAVE_2] - 1] == 4  # it did; its shares did not
    lost = reasons(federation, IN_WAVE_1)  # Flower tells a lost process, or the round times out
    assert "not reachable" in lost or "did not answer" in lost
    assert "unmask" in reasons(federation, IN_WAVE_2)


def test_every_ledger_is_verified_with_both_limits(federation):
    found = {site: federation.entries(site) for site in SITES}
    for site, entries in found.items():
        path = f"$DEPLOY/{site}/state/ledger.sqlite"
        limits = f"--max-epsilon {LIMIT} --max-epsilon-alone {LIMIT_ALONE}"
        federation.made.run(f'lalora ledger verify --path "{path}" {limits}')
        assert 0 < epsilon([entry.release for entry in entries], DELTA) <= EPSILON
        assert 0 < epsilon([entry.release_alone for entry in entries], DELTA) <= LIMIT_ALONE
    lines = sum(map(len, found.values()))
    # The site that was killed while it trained has paid for a sum that it did not send.
    assert lines == sum(row["replies"] for row in federation.rows) + 1


def test_a_client_that_no_site_has_pinned_is_refused_by_every_site(federation):
    made = federation.made
    before = {site: len(federation.entries(site)) for site in SITES}
    start_site(made, STRANGER)
    made.ready()
    changes = {"min-clients": 5, "min-replies": 4, "num-server-rounds": 1}
    run = random_kills.Submission(made, federation.keys | changes | {"train.union-size": 400})
    run.begun = {path.parents[1] for path in run.results.glob("*/checkpoints/attempt-*")}
    run.submit()
    until(lambda: attempts(run) != [], 600, "the history of the refused run")
    (row,) = attempts(run)
    assert not row["aggregated"]
    law = REFUSALS["peers"]
    assert sum(law in reason for reason in row["dropped"]) >= 1
    assert {site: len(federation.entries(site)) for site in SITES} == before
    for site in SITES:
        assert "pinned" in made.log(site), site
