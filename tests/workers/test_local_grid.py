"""The Grid of worker processes, with workers in this process: the same app, the same results."""

import time
from collections.abc import Callable, Collection

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from helpers.app_runs import ledger_entries, open_run, run, run_folder, sized
from helpers.secure_runs import ON
from lalora_app import server_app
from lalora_app.settings.run_config import flatten
from lalora_app.workers import flower_names
from lalora_app.workers.local_grid import LocalGrid
from lalora_app.workers.worker import Task, answer
from lalora_app.workers.worker_pool import Answer


class PoolHere:
    """Answers one task per ``collect`` in this process.

    Args:
        reply: returns the bytes of reply and state of a task; None: its worker has died.
    """

    def __init__(self, reply: Callable[[Task], tuple[bytes, bytes] | None]):
        self.reply = reply
        self.queue: list[tuple[str, int, Callable[[], Task]]] = []
        self.tasks: list[Task] = []

    def submit(self, key: str, node: int, make: Callable[[], Task]) -> None:
        self.queue.append((key, node, make))

    def drop(self, keys: Collection[str]) -> None:
        self.queue = [queued for queued in self.queue if queued[0] not in keys]

    def collect(self, seconds: float | None) -> list[Answer]:
        if not self.queue:
            time.sleep(seconds or 0)
            return []
        key, node, make = self.queue.pop()  # the last comes first: order must not matter
        self.tasks.append(task := make())
        return [Answer(key, node, self.reply(task))]


def app_of(config):
    """The ClientApp as it answers in a worker."""
    values = flatten(config)
    return lambda task: answer(task, values)


def counted(entries) -> list[tuple]:
    return sorted((entry.dataset, entry.round, entry.release.count) for entry in entries)


CASES = {
    "la-lora": (open_run, 2, {}),
    "la-lora, a private run": (sized, 2, {}),
    "flora, mixed ranks": (open_run, 2, {"method": "flora", "lora.ranks": "2,1"}),
    "secure aggregation": (open_run, 4, ON),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_is_the_same_as_on_another_grid(case, tiny, tmp_path, monkeypatch):
    keys, clients, changes = CASES[case]
    changes = keys(clients, **changes | {"privacy.noise": "seeded"})
    expected = run(tiny(**changes | {"output": str(tmp_path / "a")}), clients)
    books = counted(ledger_entries())

    monkeypatch.setenv("LALORA_HOME", str(tmp_path / "other"))
    config = tiny(**changes | {"output": str(tmp_path / "b")})
    server_app.run(LocalGrid(PoolHere(app_of(config)), clients), config)
    found = run_folder(config)
    weights = (found.adapter / "adapter_model.safetensors").read_bytes()
    assert weights == (expected.folder.adapter / "adapter_model.safetensors").read_bytes()
    assert counted(ledger_entries()) == books
    assert [row["replies"] for row in found.history()] == [row["replies"] for row in expected.rows]


def echo(task: Task) -> tuple[bytes, bytes]:
    """Reply with the number of messages that the node's state counts, and count one more."""
    message = flower_names.message_from_bytes(task.message)
    context = flower_names.new_context(task.node, task.node_config, {})
    flower_names.load_state(context, task.state)
    before = context.state.get("count", ConfigRecord({"messages": 0}))["messages"]
    context.state["count"] = ConfigRecord({"messages": before + 1})
    reply = Message(RecordDict({"seen": ConfigRecord({"before": before})}), reply_to=message)
    return flower_names.message_to_bytes(reply), flower_names.state_to_bytes(context)


def asked(grid: LocalGrid, *nodes: int) -> list[Message]:
    return [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]


def seen(replies: list[Message]) -> dict[int, int]:
    return {reply.metadata.src_node_id: reply.content["seen"]["before"] for reply in replies}


def test_each_node_has_a_state_and_a_partition_of_its_own():
    grid = LocalGrid(pool := PoolHere(echo), 3)
    one, two, three = grid.get_node_ids()
    assert seen(grid.send_and_receive(asked(grid, one, two))) == {one: 0, two: 0}
    assert seen(grid.send_and_receive(asked(grid, one, three))) == {one: 1, three: 0}
    assert seen(grid.send_and_receive(asked(grid, one, two))) == {one: 2, two: 1}
    configs = {task.node: task.node_config for task in pool.tasks}
    assert [configs[node]["partition-id"] for node in (one, two, three)] == [0, 1, 2]
    assert {config["num-partitions"] for config in configs.values()} == {3}


def test_a_dead_worker_is_an_error_reply_and_leaves_the_state_as_it_was():
    died: list[int] = []

    def reply(task: Task) -> tuple[bytes, bytes] | None:
        if task.state and not died:
            died.append(task.node)
            return None
        return echo(task)

    grid = LocalGrid(PoolHere(reply), 1)
    (node,) = grid.get_node_ids()
    assert seen(grid.send_and_receive(asked(grid, node))) == {node: 0}
    (lost,) = grid.send_and_receive(asked(grid, node))
    assert lost.has_error()
    assert (lost.error.code, lost.metadata.src_node_id) == (flower_names.LOST, node)
    assert seen(grid.send_and_receive(asked(grid, node))) == {node: 1}


def test_after_the_timeout_nothing_is_begun_and_a_late_reply_counts_for_the_state_only():
    slow = 0.3

    def reply(task: Task) -> tuple[bytes, bytes]:
        time.sleep(slow)
        return echo(task)

    grid = LocalGrid(pool := PoolHere(reply), 2)
    one, two = grid.get_node_ids()
    (first,) = grid.send_and_receive(asked(grid, one, two), timeout=slow / 2)
    assert len(pool.tasks) == 1
    assert pool.queue == []
    assert seen([first]) == {two: 0}
    assert grid.send_and_receive(asked(grid, one), timeout=0) == []
    assert len(pool.tasks) == 1
    (key,) = grid.push_messages(asked(grid, one))
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([key])] == [key]
    assert grid.pull_messages([key]) == []  # each reply is given once
