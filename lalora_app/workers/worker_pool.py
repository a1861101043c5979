"""Worker processes that answer messages, each started again when it has died."""

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from tempfile import gettempdir
from typing import Any, Self

from lalora_app.settings.errors import ConfigError
from lalora_app.workers.worker import Place, Task, serve

# Imported once, in the process from which the workers are forked.
_PRELOADED = ["lalora_app.workers.preloaded"]
_END_SECONDS = 5.0  # for a worker to end by itself
_log = logging.getLogger("flwr")

Main = Callable[[Connection, Place, Mapping[str, Any]], None]


@dataclass
class _Worker:
    """A process, its connection, and the key of the task that it works on; "": it is idle."""

    place: Place
    process: ForkServerProcess
    connection: Connection
    key: str = ""


@dataclass(frozen=True)
class _Queued:
    """A task that waits; it is made when a worker is free, with the node's state of then."""

    key: str
    node: int
    make: Callable[[], Task]


@dataclass(frozen=True)
class Answer:
    """The answer to a task, or the news that its worker died.

    Attributes:
        key: the key of the task.
        node: its node.
        result: the bytes of the reply and of the node's state; None: the worker died.
    """

    key: str
    node: int
    result: tuple[bytes, bytes] | None


def prepare_start() -> ForkServerContext:
    """Start the process from which workers are forked; it imports their libraries meanwhile.

    Raises:
        ConfigError: if the folder of temporary files cannot hold its socket.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    try:
        ensure_running()
    except OSError as error:
        law = "must be a folder that can hold the socket of the worker processes"
        raise ConfigError(f"TMPDIR={gettempdir()} {law}: {error}") from error
    return context


class WorkerPool:
    """A fixed number of worker processes with one queue of tasks.

    A node is served by one worker at a time, and by the worker that has served it before if that is
    idle: the node's data is in its memory.

    Args:
        places: where each worker computes.
        run_config: the app's flat config.
        main: the main function of a worker.
    """

    def __init__(self, places: Sequence[Place], run_config: Mapping[str, Any], main: Main = serve):
        self._context = prepare_start()
        self._main = main
        self._run_config = dict(run_config)
        self._queue: list[_Queued] = []
        self._last: dict[int, _Worker] = {}  # node -> the worker that has served it last
        self._busy: dict[int, _Worker] = {}
        self._workers = [self._start(place) for place in places]

    def _start(self, place: Place) -> _Worker:
        own, other = self._context.Pipe()
        args = (other, place, self._run_config)
        process = self._context.Process(target=self._main, args=args, daemon=True)
        process.start()
        other.close()
        return _Worker(place, process, own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(_END_SECONDS)
            worker.process.kill()
            worker.process.join()

    def submit(self, key: str, node: int, make: Callable[[], Task]) -> None:
        """Queue a task; it goes to an idle worker at once."""
        self._queue.append(_Queued(key, node, make))
        self._send_all()

    def drop(self, keys: Collection[str]) -> None:
        """Take tasks out of the queue; those that a worker has begun are finished."""
        self._queue = [queued for queued in self._queue if queued.key not in keys]

    def _misfit(self, worker: _Worker, queued: _Queued) -> int:
        """Return 0 for the worker that served the node last, 1 for a node that is new, else 2."""
        last = self._last.get(queued.node)
        return 0 if last is worker else 1 if last is None else 2

    def _next(self) -> tuple[_Worker, _Queued] | None:
        """Return the best pair of an idle worker and a queued task whose node is idle."""
        idle = [worker for worker in self._workers if not worker.key]
        free = [queued for queued in self._queue if queued.node not in self._busy] if idle else []
        return min(product(idle, free), key=lambda pair: self._misfit(*pair), default=None)

    def _send_all(self) -> None:
        while pair := self._next():
            self._queue.remove(pair[1])
            self._send(*pair)

    def _send(self, worker: _Worker, queued: _Queued) -> None:
        worker.key = queued.key
        self._busy[queued.node] = self._last[queued.node] = worker
        with contextlib.suppress(OSError):  # it has died: _result finds out
            worker.connection.send(queued.make())

    def collect(self, seconds: float | None) -> list[Answer]:
        """Wait for answers and return those that have come.

        Args:
            seconds: longest time to wait for the first one; None: no limit.
        """
        ready = wait([worker.connection for worker in self._busy.values()], seconds)
        nodes = [node for node, worker in self._busy.items() if worker.connection in ready]
        answers = [self._answer(node) for node in nodes]
        self._send_all()
        return answers

    def _answer(self, node: int) -> Answer:
        worker = self._busy.pop(node)
        answer = Answer(worker.key, node, self._result(worker))
        worker.key = ""
        return answer

    def _result(self, worker: _Worker) -> tuple[bytes, bytes] | None:
        """Receive a worker's result; start another process in the place of a dead one."""
        try:
            result: tuple[bytes, bytes] = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            worker.connection.close()
            _log.warning(
                "LaLoRA a worker process has ended with exit code %s, perhaps for want of memory: "
                "its client gives no reply, and it is started again",
                worker.process.exitcode,
            )
            fresh = self._start(worker.place)
            worker.process, worker.connection = fresh.process, fresh.connection
            return None
        return result
