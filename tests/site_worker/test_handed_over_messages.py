"""Messages through the site worker: the same replies and the same books as without it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from helpers.app_runs import open_run
from helpers.message_process import Case, answered, start
from helpers.recorded_messages import Recorded, copied, recorded
from helpers.site_worker_process import MOMENTS
from lalora_app.privacy.ledger import Ledger
from lalora_app.wire.flower_bytes import records_to_bytes

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
SEEDED = {"privacy.noise": "seeded", "num-server-rounds": 1}
IDLE = 0.1  # minutes
WAIT = 120.0  # seconds


@pytest.fixture
def run(tiny, tmp_path) -> Recorded:
    one = {"min-clients": 1, "min-replies": 1}
    return recorded(tiny(**open_run(1, **SEEDED, **one)), 1, tmp_path)


def cases(run: Recorded, name: str, kinds=("query", "train"), **node) -> list[Case]:
    """The run's messages to its first site, with an empty state folder."""
    state = str(run.folder / name)
    return [run.case(f"{name}-{kind}", kind, 0, **{"state-path": state, **node}) for kind in kinds]


def books(case: Case) -> list[tuple]:
    path = Path(case.context.node_config["state-path"]) / "ledger.sqlite"
    lines = Ledger(path).entries() if path.exists() else []
    return [(line.dataset, line.run, line.round, line.release) for line in lines]


def content(case: Case) -> bytes:
    return records_to_bytes(case.reply.content)


def parts(path: Path) -> tuple:
    """Header and tensors of a safetensors file, whose metadata has no fixed order."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def files(case: Case) -> dict[str, tuple]:
    folder = Path(case.context.node_config["state-path"])
    return {str(p.relative_to(folder)): parts(p) for p in folder.glob("*/*.safetensors")}


def until(holds, what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def worker_of(case: Case) -> int:
    """The process that holds the lock of a site's worker."""
    lock = Path(case.context.node_config["state-path"]) / "worker.lock"
    inode = lock.stat().st_ino
    rows = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    (pid,) = [int(row[4]) for row in rows if row[5].endswith(f":{inode}")]
    return pid


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_the_same_replies_books_and_files_as_without_it(run):
    plain, worker = (
        cases(run, "plain"),
        cases(run, "worker", **{"worker": True, "worker-idle": IDLE}),
    )
    answered(plain)
    heavy, log = answered(worker[:1])
    first = worker_of(worker[0])
    more, more_log = answered(worker[1:])
    assert [heavy, more] == [[[]], [[]]]
    assert "not used" not in log + more_log
    assert worker_of(worker[0]) == first
    assert [content(case) for case in worker] == [content(case) for case in plain]
    assert [case.refusal for case in plain] == [None, None]
    assert books(worker[1]) == books(plain[1]) != []
    assert files(worker[1]) == files(plain[1]) != {}
    until(lambda: ended(first), "the site worker must end when it is idle")
    assert not [p for p in (run.folder / "worker").iterdir() if p.suffix == ".tmp"]


@linux
def test_secure_aggregation_goes_through_the_site_worker(tiny, tmp_path):
    """The secrets travel in the context's state, there and back."""
    on = {"secure-aggregation": "secagg+", "min-clients": 3, "min-replies": 3}
    run = recorded(tiny(**open_run(3, **SEEDED, **on)), 3, tmp_path)
    (plain,) = cases(run, "plain", ["train"])
    (worker,) = cases(run, "worker", ["train"], **{"worker": True, "worker-idle": IDLE})
    answered([plain])
    heavy, log = answered([worker])
    assert (heavy, "not used" in log) == ([[]], False)
    assert plain.refusal is None
    assert content(worker) == content(plain)
    assert records_to_bytes(worker.after.state) == records_to_bytes(plain.after.state)
    stages = [r.get("stage") for r in worker.after.state.config_records.values()]
    assert "masked" in stages
    node = worker.message.metadata.dst_node_id
    waves = run.grid.of_kind("train.secagg")
    message = [m for m, _ in waves if m.metadata.dst_node_id == node][-1]
    wave = Case(run.folder / "messages" / "wave", message, copied(worker.after))
    answered([wave])
    os.kill(worker_of(worker), signal.SIGKILL)
    assert "shares" in wave.reply.content["unmask"]


def dying_worker(case: Case, moment: str, mark: Path) -> subprocess.Popen:
    """Start a site worker that dies or waits at a moment, and wait until it listens."""
    folder = Path(case.context.node_config["state-path"])
    folder.mkdir(mode=0o700)
    words = [sys.executable, "-m", "helpers.site_worker_process", moment, str(mark)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}, text=True
    )
    settings = {"folder": str(folder), "node": dict(case.context.node_config), "idle": WAIT}
    with process.stdin as pipe:
        pipe.write(json.dumps(settings))
    until(lambda: (folder / "worker.sock").exists(), "the site worker must listen")
    return process


def again_without(case: Case) -> Case:
    """The same message once more, to the same site without a site worker."""
    again = Case(case.folder.with_name("again"), case.message, copied(case.context))
    for key in ("worker", "worker-idle"):
        again.context.node_config.pop(key, None)
    answered([again])
    assert again.refusal is None
    return again


@pytest.mark.slow
@pytest.mark.quiet
@linux
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_site_worker_keeps_the_books_and_nobody_trains_again(moment, run):
    (case,) = cases(run, "worker", ["train"], worker=True)
    died, then = MOMENTS[moment]
    mark = run.folder / "mark"
    process = dying_worker(case, moment, mark)
    heavy, log = answered([case])
    assert process.wait(WAIT) == -signal.SIGKILL
    assert mark.exists()
    assert (heavy, case.refusal) == ([[]], "internal")
    assert "may be on the ledger" in log
    assert len(books(case)) == died
    again_without(case)
    assert len(books(case)) == then


@pytest.mark.slow
@pytest.mark.quiet
@linux
@pytest.mark.parametrize("moment", ["reserved", "saved"])
def test_the_books_are_those_of_a_killed_process_of_a_message(moment, run):
    """The numbers of the test before, for a site without a site worker."""
    (case,) = cases(run, "plain", ["train"])
    case.environment = {"DIE_AT": moment, "MARK": str(run.folder / "mark")}
    process = start([case])
    process.communicate(timeout=WAIT)
    assert process.returncode == -signal.SIGKILL
    died, then = MOMENTS[moment]
    assert len(books(case)) == died
    again_without(case)
    assert len(books(case)) == then


@pytest.mark.slow
@pytest.mark.quiet
@linux
@pytest.mark.parametrize("moment", ["received", "reserved", "saved"])
def test_a_killed_caller_costs_one_line_and_the_site_worker_goes_on(moment, run):
    """The site worker finishes the round; the same message again gets the saved reply."""
    (case,) = cases(run, "worker", ["train"], worker=True)
    mark = run.folder / "mark"
    worker = dying_worker(case, f"wait {moment}", mark)
    caller = start([case])
    until(mark.exists, "the moment must come")
    caller.kill()
    caller.communicate()
    mark.unlink()
    case.folder = case.folder.with_name("second")
    heavy, log = answered([case])  # waits for its turn
    assert (heavy, case.refusal, "not used" in log) == ([[]], None, False)
    assert len(books(case)) == 1
    assert worker.poll() is None
    worker.kill()
    worker.wait()
