"""Main functions of worker processes for tests: each task's message says what to do."""

import os
import signal
import time
from pathlib import Path


def obey(connection, place, run_config):
    """Answer with the process id; "die": end without an answer; a number: wait so many seconds."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if task.message == b"die":
            os._exit(9)
        if task.message != b"":
            time.sleep(float(task.message))
        connection.send((str(os.getpid()).encode(), task.state + b"+"))


def place_of(connection, place, run_config):
    """Answer with the threads and the GPU of the place, and a value of the run config."""
    task = connection.recv()
    text = f"{place.threads} {place.gpu} {run_config['seed']}"
    connection.send((text.encode(), task.state))


def die_at(stage: str, marker: Path) -> None:
    """Let this process die the first time that it comes to a stage; ``marker`` tells others."""
    if stage == os.environ.get("STAGE") and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def serve_and_die(connection, place, run_config):
    """Answer as a worker does, but die once at ``run_config["stage"]``.

    ``run_config["folder"]`` is the test's own; this process has the environment of an earlier test.
    """
    from lalora_app.client import local_round, requests
    from lalora_app.workers import worker

    run_config = dict(run_config)
    os.environ["STAGE"] = run_config.pop("stage")
    folder = Path(run_config.pop("folder"))
    os.environ["LALORA_HOME"], marker = str(folder / "home"), folder / "killed"
    answer, reserve, train = worker.answer, requests.reserve, local_round.run_round

    def answering(task, config):
        die_at("before the ClientApp", marker)
        reply = answer(task, config)
        die_at("before the reply is sent", marker)
        return reply

    def reserving(*args):
        die_at("before the reservation", marker)
        reservation = reserve(*args)
        die_at("after the reservation", marker)
        return reservation

    def training(*args, **kwargs):
        update = train(*args, **kwargs)
        die_at("after the training", marker)
        return update

    worker.answer, requests.reserve, local_round.run_round = answering, reserving, training
    worker.serve(connection, place, run_config)
