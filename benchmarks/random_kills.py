"""Kill processes of a deployment at random times, and check run and ledgers afterwards.

python benchmarks/random_kills.py FOLDER --kills 50 --rounds 60

It starts the deployment of docs/deployment.md (SuperLink, three SuperNodes, TLS, keys). A
supervisor restarts SuperNodes, as systemd would, and a run that has ended is resumed. A kill is
SIGKILL to one process: a working ClientApp, a SuperNode, or the ServerApp; with --victims also the
SuperLink, or a SuperNode that restarts with a new key and therefore a new node id. A second call
with the same folder restarts all services and continues. One line per kill is written to
FOLDER/kills.jsonl. At the end FOLDER/outcome.json says whether the run reached its end and, per
client, the number of releases in its ledger and the number that its log shows as drawn.
"""

import argparse
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guide as guides
import psutil
from guide import ROOT, Guide

from lalora_app.privacy.ledger import Ledger
from lalora_app.settings.run_config import from_tables

SITES = ("site-0", "site-1", "site-2")
VICTIMS = ("client", "site", "server")
_PROGRAMS = {
    "client": "flwr-clientapp",
    "site": "flower-supernode",
    "server": "flwr-serverapp",
    "superlink": "flower-superlink",
    "new-key": "flower-supernode",
}
_RETRY = 5.0  # seconds; a killed node is refused until its last heartbeat has expired
_DRAWN = re.compile(r"LaLoRA timing (.+)")  # times in ms distinguish a round from its repetition


def write(file: Path, values: Mapping[str, Any]) -> None:
    """Write flat keys of a run config as TOML."""
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()), "utf-8")


def live(made: Guide, program: str) -> list[psutil.Process]:
    """Return the guide's running processes of a Flower program, without shells."""
    return [
        process
        for process in made.processes(program)
        if any(Path(word).name == program for word in process.info["cmdline"][:2])
    ]


@dataclass
class Supervisor:
    """Restart services that have ended, until stopped, and count the restarts."""

    made: Guide
    starts: Counter[str] = field(default_factory=Counter)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Supervisor":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_RETRY):
            ended = [n for n, s in list(self.made.services.items()) if s.poll() is not None]
            for name in ended:
                self.starts[name] += 1
                self.made.start(name)


@dataclass
class Submission:
    """One run; it is submitted again with ``resume-from`` whenever its ServerApp has ended.

    Args:
        made: the deployment.
        tables: tables of the run config.
    """

    made: Guide
    tables: dict[str, Any]
    submitted: int = 0
    begun: set[Path] = field(default_factory=set)

    @property
    def results(self) -> Path:
        """Return the folder of all run folders."""
        return self.made.folder / "lalora-results"

    def folder(self) -> Path | None:
        """Return the newest run folder of this submission that can be resumed."""
        found = {path.parents[1] for path in self.results.glob("*/checkpoints/attempt-*")}
        return max(found - self.begun, key=lambda path: path.stat().st_mtime, default=None)

    def done(self) -> bool:
        """Return whether the run has reached its end."""
        folder = self.folder()
        file = folder / "summary.json" if folder else None
        if file is None or not file.is_file():
            return False
        return str(json.loads(file.read_text("utf-8"))["status"]).startswith("completed")

    def submit(self) -> None:
        """Submit the run, from its last checkpoint if there is one."""
        folder = self.folder()
        values = self.tables | ({"resume-from": str(folder)} if folder else {})
        file = self.made.folder / f"submission-{self.submitted}.toml"
        write(file, values)
        self.submitted += 1
        self.made.run(f'flwr run . deployment -c "{file}"', log="submissions")

    def keep_going(self) -> None:
        """Submit the run again if it is neither finished nor running."""
        server = _PROGRAMS["server"]
        if self.done() or live(self.made, server):
            return
        with contextlib.suppress(RuntimeError, TimeoutError):  # SuperLink not up yet: try again
            self.submit()
            guides.until(lambda: live(self.made, server) or self.done(), 120, "ServerApp")


def _victim(
    made: Guide, run: Submission, kind: str, chance: random.Random, patience: float
) -> psutil.Process:
    """Wait for a process of the kind, then for a random time."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not run.done():
        run.keep_going()  # a ServerApp ends by itself if its query reaches a killed site
        if found := live(made, _PROGRAMS[kind]):
            chosen = chance.choice(found)
            time.sleep(chance.uniform(0.0, 6.0))
            if chosen.is_running():
                return chosen
        time.sleep(0.2)
    raise TimeoutError(f"no {_PROGRAMS[kind]} to kill within {patience} s")


def _new_key(made: Guide, process: psutil.Process, number: int) -> None:
    """Register a new key for the site of a killed SuperNode; it restarts with a new node id."""
    words = " ".join(process.info["cmdline"])
    site = next(name for name in SITES if f"/{name}/" in words)
    own = f"$DEPLOY/{site}/{site}"
    made.run(
        f'lalora credentials node "$DEPLOY/{site}" {site}-{number}\n'
        f'flwr supernode register "{own}-{number}.pub" deployment'
    )
    key = re.compile(rf'(--auth-supernode-private-key) "{re.escape(own)}[^"]*"')
    made.start(site, key.sub(rf'\1 "{own}-{number}"', made.texts[site]))


def kill_one(
    made: Guide, run: Submission, kind: str, chance: random.Random, patience: float = 300.0
) -> dict[str, Any]:
    """Kill one process of a kind at a random time of the run; return its description.

    Raises:
        TimeoutError: if the run ends, or shows no such process within ``patience`` seconds.
    """
    process = _victim(made, run, kind, chance, patience)
    age = time.time() - process.create_time()
    process.send_signal(signal.SIGKILL)
    if kind == "new-key":
        _new_key(made, process, number=process.pid)
    folder = run.folder()
    rows = (folder / "history.jsonl").read_text("utf-8").splitlines() if folder else []
    return {"kind": kind, "pid": process.pid, "age": round(age, 1), "attempts_done": len(rows)}


def _pause(run: Submission, seconds: float) -> None:
    """Wait for a while; submit the run again if it has ended early."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run.keep_going()
        time.sleep(1.0)


def finish(run: Submission, seconds: float) -> bool:
    """Resume the run until it reaches its end."""
    deadline = time.monotonic() + seconds
    while not run.done() and time.monotonic() < deadline:
        run.keep_going()
        time.sleep(1.0)
    return run.done()


def _verified(made: Guide, path: Path) -> bool:
    verify = [sys.executable, "-m", "lalora_app.cli.main", "ledger", "verify", "--path", str(path)]
    return subprocess.run(verify, cwd=ROOT, env=made.environment, check=False).returncode == 0


def ledgers(made: Guide) -> dict[str, dict[str, Any]]:
    """Return per site the releases in its ledgers, the releases drawn in its log, and the verdict.

    A ClientApp logs a line after its last draw of a round, so the log counts at most the releases
    drawn; `lalora ledger verify` recomputes epsilon with another accountant.
    """
    found = {}
    for site in SITES:
        # the ledgers of the rehearsal and of private runs
        paths = sorted((made.state / site).glob("*/ledger.sqlite"))
        entries = [entry for path in paths for entry in Ledger(path).entries()]
        rounds = len(set(_DRAWN.findall(made.log(site))))  # two handlers may log a line twice
        steps = max((entry.release.count for entry in entries), default=0)
        counted = sum(entry.release.count for entry in entries)
        found[site] = {
            "counted": counted,
            "drawn_at_least": rounds * steps,
            "verified": bool(paths) and all(_verified(made, path) for path in paths),
            "under_reported": counted < rounds * steps,
        }
    return found


def deploy(made: Guide) -> None:
    """Execute the guide up to its rehearsal: three SuperNodes without a limit of ε.

    If the folder has a deployment already, its services are started again.
    """
    there = made.state.exists()
    blocks = made.blocks if there else guides.execute(made, set())
    for block in blocks:
        if block.name == "rehearsal":
            break
        if there and block.kind == "service":
            made.start(block.name, block.text)
    made.ready()


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, resume, verify; return 0 if the run reached its end and no ledger lacks a release."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", default=",".join(VICTIMS))
    parser.add_argument("-c", "--run-config", type=Path, help="TOML; the default run otherwise")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--pause", type=float, default=20.0, help="mean seconds between kills")
    parser.add_argument("--hours", type=float, default=3.0, help="for all of it")
    args = parser.parse_args(argv)
    text = args.run_config.read_text("utf-8") if args.run_config else ""
    tables = from_tables(tomllib.loads(text))
    tables |= {"num-server-rounds": args.rounds, "min-clients": 3, "min-replies": 1}
    tables |= {"round-timeout": 60.0}  # wait for the reply of a killed SuperNode
    rehearsal = args.folder / "rehearsal.toml"
    args.folder.mkdir(parents=True, exist_ok=True)
    write(rehearsal, tables)
    variables = {"REHEARSAL": str(rehearsal), "FIRST_RUN": str(rehearsal), "LALORA_TIMING": "1"}
    with guides.guide(args.folder, **variables) as made:
        outcome = _campaign(made, tables, args)
    (args.folder / "outcome.json").write_text(json.dumps(outcome, indent=2) + "\n", "utf-8")
    print(json.dumps(outcome, indent=2))
    short = any(
        site["under_reported"] or not site["verified"] for site in outcome["ledgers"].values()
    )
    return 0 if outcome["completed"] and not short else 1


def _campaign(made: Guide, tables: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    chance, deadline = random.Random(args.seed), time.monotonic() + 3600 * args.hours
    run, file = Submission(made, tables), args.folder / "kills.jsonl"
    before = file.read_text("utf-8").splitlines() if file.exists() else []
    killed = Counter(json.loads(line)["kind"] for line in before)
    deploy(made)
    with Supervisor(made) as supervisor:
        while sum(killed.values()) < args.kills and time.monotonic() < deadline:
            _pause(run, chance.expovariate(1 / args.pause))
            line = _attempt(made, run, chance.choice(args.victims.split(",")), chance)
            if line is None:
                break
            killed[line["kind"]] += 1
            with file.open("a") as lines:
                lines.write(json.dumps({"kill": sum(killed.values())} | line) + "\n")
        completed = finish(run, max(60.0, deadline - time.monotonic()))
    return {
        "kills": dict(killed),
        "submissions": run.submitted,
        "supernode_starts": dict(supervisor.starts),
        "completed": completed,
        "ledgers": ledgers(made),
    }


def _attempt(
    made: Guide, run: Submission, kind: str, chance: random.Random
) -> dict[str, Any] | None:
    """Return the line of a kill; None if the run has ended."""
    try:
        return {"time": round(time.time(), 1)} | kill_one(made, run, kind, chance)
    except (TimeoutError, psutil.NoSuchProcess) as error:
        print(f"random_kills: {error}", file=sys.stderr)
        return None if run.done() else _attempt(made, run, kind, chance)


if __name__ == "__main__":
    sys.exit(main())
