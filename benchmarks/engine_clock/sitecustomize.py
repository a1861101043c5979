"""Clock the ClientApp and the server's waves of messages in every process of a run.

Python imports this file at its start if its folder is in PYTHONPATH. Each call appends a line of
JSON to the file in the environment variable ENGINE_CLOCK.
"""

import functools
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

TARGETS = ("lalora_app.client_app", "lalora_app.server_app")


def note(**row):
    """Append one line."""
    line = json.dumps(row | {"pid": os.getpid()}) + "\n"
    with Path(os.environ["ENGINE_CLOCK"]).open("a", encoding="utf-8") as file:
        file.write(line)


def clocked(function, describe):
    """Return the function, which notes the start and the end of each call."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            note(start=start, end=time.time(), **describe(*args, **kwargs))

    return call


def clock_client(module):
    """Note each message that the ClientApp answers."""
    kind = type(module.app)
    kind.__call__ = clocked(kind.__call__, lambda app, message, context: {"what": "client"})


def clock_server(module):
    """Note each wave of messages that the ServerApp waits for."""
    serve = module.serve

    def clocked_serve(grid, *args, **kwargs):
        kind = type(grid)
        kind.send_and_receive = clocked(
            kind.send_and_receive,
            lambda grid, messages, **options: {
                "what": "wave",
                "type": messages[0].metadata.message_type if messages else "none",
                "messages": len(messages),
            },
        )
        return serve(grid, *args, **kwargs)

    module.serve = clocked_serve


class Finder:
    """Changes the two modules when they have been imported."""

    def find_spec(self, name, path=None, target=None):
        """Return the spec of a module that is changed once it has been executed."""
        if name not in TARGETS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def changed(module):
            execute(module)
            (clock_client if name.endswith("client_app") else clock_server)(module)

        spec.loader.exec_module = changed
        return spec


if "ENGINE_CLOCK" in os.environ:
    sys.meta_path.insert(0, Finder())
