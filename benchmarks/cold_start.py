"""Measure the CPU seconds of a client message as in a deployment, where each starts a process.

python benchmarks/cold_start.py --repeats 3 [--rows 100000]

A site with a data file of its own answers a query and the rounds of the default run, first by the
process of each message alone, then through the site worker (``worker=true``). The kinds of message
that need no model follow: the waves of secure aggregation, a repeated request, and a refusal of the
budget. The server uses the app's own Strategy, so requests have their real size. It prints medians,
and writes them to benchmarks/results/cold_start.json:

python, flower     CPU seconds of the start of Python and of the import of Flower
torch, app         of the imports of torch and of this app
data, model, accounting, training, rest   of the parts of the message
worker             of the site worker during the message, with its training
besides            all CPU seconds of both processes without training, Python's and Flower's start
memory_mb          resident memory of the site worker after the message

"floor" is a process that only imports torch, transformers and PEFT. Flower's own part of a message
(its processes, app bundle and polling) is not included.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).parent / "results" / "cold_start.json"
FLOOR = "import torch, transformers.modeling_utils, peft"
ROUNDS = 3
WAVES = ("advertise", "share", "unmask")
LIBRARIES = ("flwr", "torch", "transformers", "peft", "opacus")
_NODE = 2

Row = dict[str, Any]


def _clocked(module: Any, name: str, phase: str, spent: dict[str, float]) -> None:
    """Record a function's CPU seconds, without those of other recorded functions that it calls."""
    inner = getattr(module, name)

    @functools.wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        before, start = sum(spent.values()), time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            nested = sum(spent.values()) - before
            spent[phase] = spent.get(phase, 0.0) + time.process_time() - start - nested

    setattr(module, name, timed)


def _clock_parts(spent: dict[str, float], lap: Callable[[str], None]) -> None:
    """Import what a message with a model needs, and record the parts of the message."""
    import torch  # noqa: F401

    lap("torch")
    from lalora_app.client import answers, received_round, requests

    lap("app")
    _clocked(requests, "_load", "data", spent)
    _clocked(requests.backbone, "build", "model", spent)
    _clocked(answers, "check_limits", "accounting", spent)
    _clocked(requests, "reserve", "accounting", spent)
    _clocked(received_round, "epsilon", "accounting", spent)
    _clocked(requests.local_round, "run_round", "training", spent)


def answer(folder: Path, parts: bool) -> dict[str, float]:
    """Answer the message in a folder in this process; return CPU seconds per phase."""
    spent = {"python": time.process_time()}

    def lap(phase: str) -> None:
        spent[phase] = spent.get(phase, 0.0) + time.process_time() - sum(spent.values())

    from flwr.clientapp import ClientApp  # noqa: F401
    from flwr.supercore.task_identity import TaskIdentity

    lap("flower")
    from lalora_app import client_app
    from lalora_app.wire import flower_bytes

    lap("app")
    if parts:
        _clock_parts(spent, lap)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = _NODE
    message = flower_bytes.message_from_bytes((folder / "request").read_bytes())
    context = flower_bytes.context_from_bytes((folder / "context").read_bytes())
    said = client_app.app(message, context)
    lap("rest")
    (folder / "reply").write_bytes(flower_bytes.message_to_bytes(said))
    return spent


def work(seconds: Path) -> int:
    """Run the site worker, and write the CPU seconds of each round's training to a file."""
    from lalora_app.client import local_round
    from lalora_app.site_worker import process

    spent: dict[str, float] = {}
    _clocked(local_round, "run_round", "training", spent)
    inner = local_round.run_round

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        seconds.write_text(str(spent["training"]), "utf-8")
        return result

    local_round.run_round = noted
    return process.main()


@dataclass
class Site:
    """One site in a folder, with or without a site worker.

    Attributes:
        folder: of the messages.
        node: the node config.
        worker: the site worker; None: each message is answered by its own process.
    """

    folder: Path
    node: Row
    worker: Any = None

    def start_worker(self) -> None:
        """Start the site worker, with clocks."""
        import psutil

        state = Path(self.node["state-path"])
        state.mkdir(mode=0o700)
        words = [sys.executable, __file__, "--work", str(self.folder / "training")]
        settings = {"folder": str(state), "node": self.node, "idle": 600.0}
        self.worker = psutil.Popen(words, stdin=subprocess.PIPE, cwd=self.folder)
        self.worker.stdin.write(json.dumps(settings).encode())
        self.worker.stdin.close()
        while not (state / "worker.sock").exists():
            time.sleep(0.05)

    def _worker_seconds(self) -> float:
        times = self.worker.cpu_times()
        return float(times.user + times.system)

    def _training_seconds(self) -> float:
        file = self.folder / "training"
        return float(file.read_text("utf-8")) if file.exists() else 0.0

    def deliver(self, message: Any, *, parts: bool = True, **node: Any) -> tuple[Any, Row]:
        """Answer a message in a new process; return its reply and its CPU seconds."""
        from flwr.app import Context, RecordDict

        context = Context(1, _NODE, self.node | node, RecordDict(), {})
        return self.deliver_in(message, context, parts=parts)

    def deliver_in(self, message: Any, context: Any, *, parts: bool) -> tuple[Any, Row]:
        """Answer a message with its context, as :meth:`deliver` does."""
        from lalora_app.wire import flower_bytes

        message.metadata.__dict__["_message_id"] = "0"
        (self.folder / "request").write_bytes(flower_bytes.message_to_bytes(message))
        (self.folder / "context").write_bytes(flower_bytes.context_to_bytes(context))
        own = parts and self.worker is None
        words = [sys.executable, __file__, "--answer", str(self.folder), "parts" if own else "all"]
        before = self._worker_before()
        start = time.monotonic()
        told = subprocess.run(words, check=True, stdout=subprocess.PIPE, cwd=self.folder).stdout
        row: Row = {**json.loads(told.splitlines()[-1]), "wall": time.monotonic() - start}
        row["besides"] = sum(row.get(name, 0.0) for name in _PHASES)
        if self.worker is not None:
            row |= self._of_worker(*before)
            row["besides"] += row["worker"] - row["training"]
        reply = flower_bytes.message_from_bytes((self.folder / "reply").read_bytes())
        return reply, row

    def _worker_before(self) -> tuple[float, float]:
        return (self._worker_seconds(), self._training_seconds()) if self.worker else (0.0, 0.0)

    def _of_worker(self, seconds: float, training: float) -> Row:
        return {
            "worker": self._worker_seconds() - seconds,
            "training": self._training_seconds() - training,
            "memory_mb": self.worker.memory_info().rss / 2**20,
        }


# The phases of the process of a message that count as "besides".
_PHASES = ("torch", "app", "data", "model", "accounting", "rest")


def _data(folder: Path, rows: int) -> Path:
    """Write a site's data file of ``rows`` messages, repeating the demo's messages."""
    demo = (ROOT / "lalora_app" / "assets" / "sms_spam.jsonl").read_text("utf-8").splitlines()
    path = folder / "messages.jsonl"
    path.write_text("\n".join(demo[i % len(demo)] for i in range(rows)) + "\n", "utf-8")
    return path


def _config() -> Any:
    from lalora_app.settings.run_config import from_tables, parse

    app = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    changes = {"min-clients": 1, "min-replies": 1, "num-server-rounds": ROUNDS}
    changes["data.num-labels"] = 2
    return parse({**from_tables(app["config"]), **changes})


def _rounds(site: Site, config: Any) -> tuple[list[Row], list[Any]]:
    """Run the server's side of one run; return a row per message, and the train requests."""
    from flwr.app import Message, RecordDict

    from lalora_app.methods.compatibility import method_of
    from lalora_app.models import backbone
    from lalora_app.server.cohorts import Clients
    from lalora_app.server.strategy import FederatedLora
    from lalora_app.server_state.state import ServerState
    from lalora_app.settings.run_config import flatten
    from lalora_app.wire import messages

    content = RecordDict({messages.RUN_CONFIG: messages.run_config(flatten(config))})
    said, row = site.deliver(Message(content, dst_node_id=_NODE, message_type="query"))
    messages.parse_hello(said)
    rows: list[Row] = [{"message": "query", **row}]
    model, start = backbone.build(config)
    clients = Clients([_NODE], [(0,)] * ROUNDS, model=model.fingerprint)
    strategy = FederatedLora(config, method_of(config), "run", clients, ServerState(start))
    asked = []
    for t in range(1, ROUNDS + 1):
        (request,) = strategy.configure_train(t, None, None, None)  # type: ignore[arg-type]
        asked.append(request)
        reply, row = site.deliver(request)
        strategy.aggregate_train(t, [reply])
        done = strategy.attempts[-1]
        if not done.aggregated:
            raise RuntimeError(f"round {t}: {done.dropped}")
        sizes = {"up": done.upload_bytes, "down": done.download_bytes}
        rows.append({"message": f"train {t}", **row, **sizes})
        if t == 1:  # the last request would first be asked for again with all tensors
            rows.append(_repeated(site, request))
    return rows, asked


def _require(reply: Any, refusal: str | None) -> None:
    found = next((r["refusal"] for r in reply.content.values() if "refusal" in r), None)
    if found != refusal:
        raise RuntimeError(f"the reply has the refusal {found!r}, and must have {refusal!r}")


def _without_model(site: Site, request: Any) -> list[Row]:
    """Return the rows of a refusal of the budget and of a wave of every kind."""
    limit = {"max-epsilon": 0.01, "delta": 1e-5}
    reply, row = site.deliver(request, parts=False, **limit)
    _require(reply, "budget")
    rows = [{"message": "budget refused", **row}]
    for wave, (message, context) in _waves().items():
        reply, row = site.deliver_in(message, context, parts=False)
        _require(reply, None)
        rows.append({"message": f"secagg {wave}", **row})
    return rows


def _repeated(site: Site, request: Any) -> Row:
    """Return the row of a request whose saved reply is sent again."""
    reply, row = site.deliver(request, parts=False)
    _require(reply, None)
    return {"message": "repeated", **row}


def _waves() -> dict[str, tuple[Any, Any]]:
    """Return a message of each wave to one of 20 clients, with that client's context."""
    import secagg
    from flwr.app import Message

    from lalora_app.secagg.messages import KEYS_MESSAGE
    from lalora_app.wire.flower_bytes import context_from_bytes, context_to_bytes

    found: dict[str, tuple[Any, Any]] = {}

    class Recording(secagg.Loopback):
        def _answer(self, message: Message) -> Message:
            context = self.contexts[message.metadata.dst_node_id]
            before = context_from_bytes(context_to_bytes(context))
            if message.metadata.message_type == KEYS_MESSAGE:
                for wave in [wave for wave in WAVES if wave in message.content]:
                    found.setdefault(wave, (message, before))
            return super()._answer(message)

    config, start = secagg.config_of("secagg+", 20, 1), secagg.adapter_of("default")
    grid = Recording(config, start, 20)
    members = secagg.Clients(list(grid.contexts), [tuple(range(20))])
    kind = secagg.STRATEGIES["secagg+"]
    state = secagg.ServerState(start)
    strategy = kind(config, secagg.method_of(config), "run", members, state)
    secagg.one_round(strategy, grid)
    return {wave: found[wave] for wave in WAVES}


def serve(folder: Path, rows: int) -> list[Row]:
    """Measure one run of each kind; return one row per message."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    config, data = _config(), str(_data(folder, rows))
    found: list[Row] = []
    for process in ("own", "site worker"):
        own = folder / process.replace(" ", "-")
        own.mkdir()
        node = {"data-path": data, "name": "site", "max-epsilon": float("inf")}
        node |= {"state-path": str(own / "state"), "data-cache": str(own / "cache")}
        site = Site(own, node | ({"worker": True} if process != "own" else {}))
        if process != "own":
            site.start_worker()
        told, asked = _rounds(site, config)
        if process == "own":
            told += _without_model(site, asked[0])
        else:
            site.worker.kill()
            site.worker.wait()
        found += [{"process": process, **row} for row in told]
    return found


def _floor() -> float:
    code = f"{FLOOR}\nimport time\nprint(time.process_time())"
    told = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    return float(told)


def _medians(rows: Sequence[Row]) -> list[Row]:
    """Return one row per kind of process and message, with medians over the repetitions."""
    names = ("process", "message")
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        middle = {
            name: round(statistics.median(row[name] for row in own), 3)
            for name in own[0]
            if name not in names
        }
        found.append(dict(zip(names, key, strict=True)) | middle)
    return found


def _run(rows: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--serve", folder, str(rows)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        told = subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment).stdout
    found: list[Row] = json.loads(told.splitlines()[-1])
    for row in found:
        print(json.dumps(row), file=sys.stderr)
    return found


def _measure(repeats: int, rows: int) -> None:
    found: list[Row] = []
    floors = []
    for _ in range(repeats):
        floors.append(_floor())
        found += _run(rows)
    medians = _medians(found)
    for row in medians:
        print(json.dumps(row))
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    result = {
        "repeats": repeats,
        "rows_of_data": rows,
        "machine": machine | {name: version(name) for name in LIBRARIES},
        "floor": round(statistics.median(floors), 3),
        "messages": medians,
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def main() -> int:
    """Measure the messages and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="of the site's data")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    if args.answer:
        folder, parts = args.answer
        print(json.dumps(answer(Path(folder), parts == "parts")))
    elif args.serve:
        folder, rows = args.serve
        print(json.dumps(serve(Path(folder), int(rows))))
    else:
        _measure(args.repeats, args.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
