"""Measure the cost of secure aggregation: bytes per client and round, CPU seconds of both sides.

python benchmarks/secagg.py                     # 4 and 20 clients, a tiny and the default adapter
python benchmarks/secagg.py --clients 100 --rounds 1
python benchmarks/secagg.py --simulate          # also times rounds of `lalora run`

The app's Strategy and the app's client stages run in this process, over a grid that serialises
every message. Clients do not train: they add normal noise to the received tensors, so only the
protocol is measured. It writes benchmarks/results/secagg.json and prints medians over the rounds:

up, down   serialised bytes of all messages of a client, with the run config in the request
client     CPU seconds of one client without training: keys, shares, masks, unmasking
server     CPU seconds of the server: messages, unmasking, aggregation
error      largest difference from the mean of the uploads in float64, including the rounding of the
           adapter to float32 (the only error without secure aggregation), and the bound of the sum
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from lalora_app.adapter.factors import Adapter, select
from lalora_app.client.answers import add_stages
from lalora_app.methods.compatibility import method_of
from lalora_app.secagg import fixed_point, upload
from lalora_app.secagg.messages import KEYS_MESSAGE
from lalora_app.server.cohorts import Clients
from lalora_app.server_app import STRATEGIES
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config, from_tables, parse
from lalora_app.wire import messages

APP = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).parent / "results" / "secagg.json"
WAYS = ("none", "secagg+")  # secure-aggregation
SHAPES = {"tiny": (4, 16, 2), "default": (12, 384, 8)}  # target layers, width, rank
FACTOR = 1 << 40  # makes node ids as large as Flower's


def adapter_of(size: str) -> Adapter:
    """Return a random adapter of the given size, with a head for two labels."""
    layers, width, rank = SHAPES[size]
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"score.weight": (2, width), "score.bias": (2,)}
    for layer in range(layers):
        shapes[f"layer.{layer}.lora_A.weight"] = (rank, width)
        shapes[f"layer.{layer}.lora_B.weight"] = (width, rank)
    return {n: 0.05 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}


class Loopback(Grid):
    """A grid with clients in this process; every message is serialised, counted and timed."""

    def __init__(self, config: Config, like: Adapter, clients: int):
        self.config, self.like = config, like
        nodes = [FACTOR + i for i in range(clients)]
        self.contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in nodes}
        self.rng = np.random.default_rng(1)
        self.uploads: list[Adapter] = []
        self.totals: dict[str, float] = defaultdict(float)

    def _trained(self, message: Message, context: Context) -> RecordDict:
        """Reply like a client, with noise in place of the result of training."""
        request = messages.parse_request(message.content, self.config)
        there = message.content[messages.ARRAYS]  # without A, which every client holds by now
        like = {name: array for name, array in self.like.items() if name in there}
        start = select(messages.adapter_of(message.content, like), frozenset("B"))
        sent = {
            n: x + 0.05 * self.rng.standard_normal(x.shape, np.float32) for n, x in start.items()
        }
        self.uploads.append(sent)
        seal = upload.UPLOAD_ENCODERS[self.config.secure_aggregation](
            message.content, context, request
        )
        return messages.TrainReply(seal(sent, start), request.round, 1.0).record()

    def _answer(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        trains = message.metadata.message_type != KEYS_MESSAGE
        content = self._trained(message, context) if trains else RecordDict()
        add_stages(content, message, context)
        return Message(content, reply_to=message)

    def send_and_receive(self, messages, *, timeout=None):
        """Deliver messages; time in here counts as client time, all other time as server time."""
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(len(replies))
            request = message_to_proto(message)
            began = time.process_time()
            reply = message_to_proto(self._answer(message_from_proto(request)))
            self.totals["client"] += time.process_time() - began
            self.totals["down"] += request.ByteSize()
            self.totals["up"] += reply.ByteSize()
            replies.append(message_from_proto(reply))
        return replies

    def push_messages(self, messages):
        """Not used by a Strategy."""
        raise NotImplementedError

    pull_messages = create_message = set_run = push_messages

    def get_node_ids(self):
        """Return the nodes."""
        return set(self.contexts)

    @property
    def run(self):
        """Not used by a Strategy."""
        raise NotImplementedError


def config_of(secure: str, clients: int, rounds: int) -> Config:
    """Return the default run's config for the given number of clients."""
    text = (APP / "pyproject.toml").read_text("utf-8")
    values = from_tables(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    changes = {"secure-aggregation": secure, "min-clients": clients, "num-server-rounds": rounds}
    own = {"method": "ffa-lora", "weighting": "uniform", "data.num-labels": 2}
    return parse(values | changes | own)


def mean_of(uploads: list[Adapter]) -> dict[str, np.ndarray]:
    """Return the mean of the uploads in float64."""
    return {n: np.mean([u[n] for u in uploads], axis=0, dtype=np.float64) for n in uploads[0]}


def one_round(strategy, grid: Loopback) -> dict[str, float]:
    """Run one round; return bytes and seconds per client, and the error of the mean."""
    grid.totals.clear()
    grid.uploads.clear()
    began = time.process_time()
    requests = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    strategy.aggregate_train(1, grid.send_and_receive(requests))
    seconds = time.process_time() - began - grid.totals["client"]
    assert strategy.attempts[-1].aggregated, strategy.attempts[-1].dropped
    clients = len(grid.contexts)
    found = {name: total / clients for name, total in grid.totals.items()}
    error = max(
        float(np.abs(strategy.state.adapter[n] - mean).max())
        for n, mean in mean_of(grid.uploads).items()
    )
    return found | {"server": seconds, "error": error}


def measure(size: str, clients: int, rounds: int, secure: str) -> dict[str, object]:
    """Return the medians of one case."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    config, start = config_of(secure, clients, rounds), adapter_of(size)
    grid = Loopback(config, start, clients)
    cohorts = [tuple(range(clients))] * rounds
    members = Clients(list(grid.contexts), cohorts)
    kind = STRATEGIES[secure, "own"]
    strategy = kind(config, method_of(config), "run", members, ServerState(start))
    rows = [one_round(strategy, grid) for _ in range(rounds)]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    bound = fixed_point.error_bound(clients) if secure != "none" else 0.0
    case = {"adapter": size, "clients": clients, "secure": secure}
    tensors = strategy.attempts[-1].upload_bytes
    return case | medians | {"error_bound": bound, "tensors": tensors}


def simulated(clients: int, rounds: int, secure: str) -> float:
    """Return the median seconds of a round of `lalora run`, without the first two rounds."""
    changes = "data.dirichlet-alpha=inf train.batch-size=16 train.local-steps=2"
    with tempfile.TemporaryDirectory() as folder:
        own = f'num-server-rounds={rounds} min-clients={clients} output="{folder}"'
        keys = f'{changes} {own} secure-aggregation="{secure}"'
        command = [sys.executable, "-m", "lalora_app.cli.main", "run", str(APP)]
        command += ["--nodes", str(clients), "-c", keys]
        subprocess.run(command, check=True, capture_output=True)
        (history,) = Path(folder).glob("*/history.jsonl")
        rows = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
    return statistics.median(row["seconds"] for row in rows[2:])


def show(found: dict[str, object]) -> None:
    """Print one line of the table."""
    print(
        "{adapter:8} {clients:>3} clients {secure:8} up {up:>9,.0f} B  down {down:>9,.0f} B  "
        "client {client:6.3f} s  server {server:6.2f} s  error {error:.1e} of {error_bound:.1e}"
        "".format(**found),
        flush=True,
    )


def main() -> None:
    """Measure every case, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulate", action="store_true", help="seconds of `lalora run`, too")
    arguments = parser.parse_args()
    results = []
    for size, clients in [(size, clients) for size in SHAPES for clients in arguments.clients]:
        for secure in WAYS:
            results.append(measure(size, clients, arguments.rounds, secure))
            show(results[-1])
    for clients in arguments.clients if arguments.simulate else []:
        for secure in WAYS:
            seconds = simulated(clients, 2 + arguments.rounds, secure)
            results.append({"simulated": clients, "secure": secure, "seconds": seconds})
            print(f"lalora run, {clients} clients, {secure}: {seconds:.2f} s a round", flush=True)
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
