"""Measure the time of a client message if every message starts a process, as in a deployment.

python benchmarks/cold_start.py --repeats 3 [--before ANOTHER_CHECKOUT] [--rows 100000]

A site with a data file of its own answers a query and the rounds of the default run. Each message
is answered by a new Python process, which reports CPU seconds per phase. Checkouts are measured in
turn, and medians are printed as JSON. The server uses the app's own Strategy, so requests have
their real size. "floor" is a process that only imports torch, transformers and PEFT. Flower's own
part of a message (its processes, app bundle and polling) is not included.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLOOR = "import torch, transformers.modeling_utils, peft"
ROUNDS = 3
_NODE = 2


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


def answer(request: Path, reply: Path, node: dict[str, Any]) -> dict[str, float]:
    """Answer one message in this process; return CPU seconds per phase."""
    spent = {"python": time.process_time()}

    def lap(phase: str) -> None:
        spent[phase] = time.process_time() - sum(spent.values())

    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.message_pb2 import Message as Proto
    from flwr.supercore.task_identity import TaskIdentity

    lap("flower")
    import torch  # noqa: F401

    lap("torch")
    from lalora_app import client_app
    from lalora_app.client import requests

    lap("app")
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = _NODE
    _clocked(requests, "_load", "data", spent)
    _clocked(requests.backbone, "build", "model", spent)
    _clocked(requests, "reserve", "accounting", spent)
    _clocked(requests, "_spent", "accounting", spent)
    _clocked(requests.local_round, "run_round", "training", spent)
    message = message_from_proto(Proto.FromString(request.read_bytes()))
    context = Context(1, _NODE, node, RecordDict(), {})
    said = client_app.app(message, context)
    lap("rest")
    reply.write_bytes(message_to_proto(said).SerializeToString())
    return spent


def _deliver(message: Any, folder: Path, node: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Answer a message in a new process; return its reply and its seconds."""
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.message_pb2 import Message as Proto

    message.metadata.__dict__["_message_id"] = "0"
    request, reply = folder / "request", folder / "reply"
    request.write_bytes(message_to_proto(message).SerializeToString())
    words = [sys.executable, __file__, "--answer", str(request), str(reply), json.dumps(node)]
    start = time.monotonic()
    told = subprocess.run(words, check=True, stdout=subprocess.PIPE, cwd=folder).stdout
    wall = time.monotonic() - start
    spent = json.loads(told.splitlines()[-1])
    return message_from_proto(Proto.FromString(reply.read_bytes())), spent | {"wall": wall}


def _data(folder: Path, rows: int) -> Path:
    """Write a site's data file of ``rows`` messages, repeating the demo's messages."""
    demo = (ROOT / "lalora_app" / "assets" / "sms_spam.jsonl").read_text("utf-8").splitlines()
    path = folder / "messages.jsonl"
    path.write_text("\n".join(demo[i % len(demo)] for i in range(rows)) + "\n", "utf-8")
    return path


def _config(tree: Path) -> Any:
    from lalora_app.settings.run_config import from_tables, parse

    app = tomllib.loads((tree / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    changes = {"min-clients": 1, "min-replies": 1, "num-server-rounds": ROUNDS}
    changes["data.num-labels"] = 2
    return parse({**from_tables(app["config"]), **changes})


def serve(tree: Path, folder: Path, rows: int) -> list[dict[str, Any]]:
    """Run the server's side of one run; return one row per message."""
    from flwr.app import Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from lalora_app.aggregation.server_state import ServerState
    from lalora_app.methods.compatibility import method_of
    from lalora_app.models import backbone
    from lalora_app.server.cohorts import Clients
    from lalora_app.server.strategy import FederatedLora
    from lalora_app.settings.run_config import flatten
    from lalora_app.wire import messages

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    config = _config(tree)
    node: dict[str, Any] = {"data-path": str(_data(folder, rows)), "name": "site"}
    node |= {"max-epsilon": float("inf"), "state-path": str(folder / "state")}
    node["data-cache"] = str(folder / "cache")
    content = RecordDict({messages.RUN_CONFIG: messages.run_config(flatten(config))})
    query = Message(content, dst_node_id=_NODE, message_type="query")
    said, spent = _deliver(query, folder, node)
    messages.parse_hello(said)
    rows_found: list[dict[str, Any]] = [{"message": "query", **spent}]
    model, start = backbone.build(config)
    state = ServerState(start)
    clients = Clients([_NODE], [(0,)] * ROUNDS, model=model.fingerprint)
    strategy = FederatedLora(config, method_of(config), "run", clients, state)
    for t in range(1, ROUNDS + 1):
        (request,) = strategy.configure_train(t, None, None, None)  # type: ignore[arg-type]
        reply, spent = _deliver(request, folder, node)
        strategy.aggregate_train(t, [reply])
        done = strategy.attempts[-1]
        if not done.aggregated:
            raise RuntimeError(f"round {t}: {done.dropped}")
        sizes = {"up": done.upload_bytes, "down": done.download_bytes}
        rows_found.append({"message": f"train {t}", **spent, **sizes})
    return rows_found


def _floor() -> dict[str, float]:
    code = f"{FLOOR}\nimport time\nprint(time.process_time())"
    told = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    return {"floor": float(told)}


def _medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per checkout and message, with medians over the repetitions."""
    keys = sorted({(row["tree"], row["message"]) for row in rows})
    found = []
    for tree, message in keys:
        own = [row for row in rows if (row["tree"], row["message"]) == (tree, message)]
        names = [name for name in own[0] if name not in ("tree", "message")]
        middle = {name: round(statistics.median(row[name] for row in own), 2) for name in names}
        found.append({"tree": tree, "message": message, **middle})
    return found


def _run(label: str, tree: Path, rows: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--serve", str(tree), folder, str(rows)]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        told = subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment).stdout
    found = [{"tree": label, **row} for row in json.loads(told.splitlines()[-1])]
    for row in found:
        report(json.dumps(row))
    return found


def main() -> None:
    """Measure the checkouts in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="of the site's data")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        request, reply, node = args.answer
        print(json.dumps(answer(Path(request), Path(reply), json.loads(node))))
        return
    if args.serve:
        tree, folder, rows = args.serve
        print(json.dumps(serve(Path(tree), Path(folder), int(rows))))
        return
    trees = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    rows_found: list[dict[str, Any]] = []
    floors = []
    for _ in range(args.repeats):
        floors.append(_floor()["floor"])
        for label, tree in trees.items():
            rows_found += _run(label, tree, args.rows, lambda line: print(line, file=sys.stderr))
    for row in _medians(rows_found):
        print(json.dumps(row))
    print(json.dumps({"floor": round(statistics.median(floors), 2)}))


if __name__ == "__main__":
    main()
