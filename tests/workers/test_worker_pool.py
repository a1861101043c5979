"""Worker processes: each task is answered once, and a dead worker is started again."""

import time

import psutil
import pytest

from helpers.worker_mains import obey, place_of
from lalora_app.workers.places import places, visible_gpus
from lalora_app.workers.worker import Place, Task
from lalora_app.workers.worker_pool import WorkerPool


@pytest.fixture
def pool():
    with WorkerPool([Place(1), Place(1)], {}, obey) as started:
        yield started


def task(node: int, message: bytes = b"") -> Task:
    return Task(node, {}, b"", message)


def answers(pool: WorkerPool, count: int, seconds: float = 20.0) -> dict[str, tuple | None]:
    """Return the results of the next tasks by their keys."""
    found: dict[str, tuple | None] = {}
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {sorted(found)} were answered"
        found |= {answer.key: answer.result for answer in pool.collect(1.0)}
    return found


def test_every_task_is_answered_once_by_as_many_processes_as_places(pool):
    for number in range(20):
        pool.submit(str(number), number, lambda number=number: task(number, b"0.05"))
    found = answers(pool, 20)
    assert set(found) == {str(number) for number in range(20)}
    assert len({reply for reply, _ in found.values()}) == 2
    assert pool.collect(0.2) == []


def test_a_task_is_made_when_its_worker_is_free(pool):
    made: list[str] = []

    def make(key: str) -> Task:
        made.append(key)
        return task(7, b"0.3")

    for key in ("a", "b"):  # the same node: one after the other
        pool.submit(key, 7, lambda key=key: make(key))
    assert made == ["a"]
    assert set(answers(pool, 2)) == {"a", "b"}
    assert made == ["a", "b"]


def test_a_node_goes_to_the_worker_that_has_served_it(pool):
    owners: dict[int, set] = {1: set(), 2: set()}
    for turn in range(4):
        for node in (1, 2) if turn % 2 else (2, 1):
            pool.submit(f"{turn}-{node}", node, lambda node=node: task(node, b"0.1"))
        for key, (reply, _) in answers(pool, 2).items():
            owners[int(key[-1])].add(reply)
    assert owners[1] != owners[2]
    assert all(len(found) == 1 for found in owners.values())


def test_an_idle_worker_takes_a_node_of_a_busy_one(pool):
    pool.submit("first", 1, lambda: task(1))
    ((owner, _),) = answers(pool, 1).values()
    pool.submit("long", 1, lambda: task(1, b"1.5"))
    pool.submit("other", 2, lambda: task(2))
    ((idle, _),) = answers(pool, 1).values()
    assert idle != owner
    assert set(answers(pool, 1)) == {"long"}


def test_a_dead_worker_costs_its_task_only(pool):
    pool.submit("dies", 1, lambda: task(1, b"die"))
    for number in range(2, 6):
        pool.submit(str(number), number, lambda number=number: task(number, b"0.05"))
    found = answers(pool, 5)
    assert found.pop("dies") is None
    assert all(found.values())
    pool.submit("again", 1, lambda: task(1))
    pool.submit("and", 2, lambda: task(2, b"0.2"))
    assert len({reply for reply, _ in answers(pool, 2).values()}) == 2


def test_a_worker_that_dies_while_idle_is_found_and_replaced(pool):
    pool.submit("first", 1, lambda: task(1))
    ((owner, _),) = answers(pool, 1).values()
    process = psutil.Process(int(owner))
    process.kill()
    process.wait(10)
    pool.submit("lost", 1, lambda: task(1))
    assert answers(pool, 1) == {"lost": None}
    pool.submit("again", 1, lambda: task(1))
    assert answers(pool, 1)["again"]


def test_dropped_tasks_are_never_begun(pool):
    made: list[int] = []

    def make(number: int) -> Task:
        made.append(number)
        return task(number, b"0.3")

    for number in range(5):
        pool.submit(str(number), number, lambda number=number: make(number))
    pool.drop({"2", "3", "4"})
    assert set(answers(pool, 2)) == {"0", "1"}
    assert pool.collect(0.3) == []
    assert made == [0, 1]


def test_no_process_is_left_after_the_end():
    with WorkerPool([Place(1)], {}, obey) as started:
        started.submit("a", 1, lambda: task(1))
        ((pid, _),) = answers(started, 1).values()
        started.submit("long", 1, lambda: task(1, b"60"))
        ended = time.monotonic()
    assert not psutil.pid_exists(int(pid))
    assert time.monotonic() - ended < 15


def test_a_worker_knows_its_place_and_the_run_config():
    with WorkerPool([Place(3, "GPU-7")], {"seed": 5}, place_of) as started:
        started.submit("a", 1, lambda: task(1))
        assert answers(started, 1) == {"a": (b"3 GPU-7 5", b"")}


@pytest.mark.parametrize(
    ("nodes", "cores", "gpus", "workers", "expected"),
    [
        (4, 2, [], 0, [(1, ""), (1, "")]),
        (1, 8, [], 0, [(8, "")]),
        (100, 8, [], 3, [(2, "")] * 3),
        (100, 16, ["0"], 0, [(4, "0")] * 4),
        (100, 16, ["2", "5"], 4, [(4, "2"), (4, "5")] * 2),
        (1, 16, ["0", "1"], 0, [(16, "0")]),
        (100, 2, ["0"], 0, [(1, "0")] * 4),
    ],
)
def test_places_share_cores_and_gpus(nodes, cores, gpus, workers, expected):
    found = places(nodes, cores=cores, gpus=gpus, workers=workers, clients_per_gpu=4)
    assert [(place.threads, place.gpu) for place in found] == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", []), ("auto", ["4", "7"]), ("cuda", ["4", "7"]), ("cuda:1", [""])],
)
def test_a_numbered_gpu_is_found_by_its_number_in_every_worker(device, expected, monkeypatch):
    """A worker that sees one GPU only would look for the second one in vain."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    gpus = visible_gpus(device)
    assert gpus == expected
    found = places(8, cores=16, gpus=gpus, workers=0, clients_per_gpu=4)
    assert {place.gpu for place in found} == set(gpus or [""])
    assert len(found) == {0: 8, 1: 4, 2: 8}[len(gpus)]


def test_more_workers_than_cores_are_refused():
    with pytest.raises(ValueError, match=r"--workers 3 must be at most 2, the number of cores"):
        places(8, cores=2, gpus=[], workers=3, clients_per_gpu=4)
    with pytest.raises(ValueError, match=r"--workers 5 must be at most 4, --clients-per-gpu"):
        places(8, cores=16, gpus=["0"], workers=5, clients_per_gpu=4)
