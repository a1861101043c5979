"""Main functions of worker processes for tests: each task's message says what to do."""

import os
import time


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
