"""Run pytest on copies of the package, each in a fork of a process that has the libraries ready.

Importing torch, transformers and Flower takes longer than most tests. This process imports them
once, and nothing of the package or its tests. It reads one JSON request per line and answers with
pytest's exit code, or with ``WRONG_COPY``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

WRONG_COPY = 99  # the tests imported another copy of the package
# pytest warns of plugins that were imported before it could rewrite their assertions.
READY = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
LIBRARIES = (
    *("pytest", "hypothesis", "numpy", "scipy.stats", "torch", "transformers", "peft", "timm"),
    *("opacus.accountants", "flwr.app", "flwr.clientapp", "flwr.serverapp", "matplotlib.figure"),
)


class PytestServer:
    """The other end: start the process, and ask it for runs."""

    def __init__(self) -> None:
        hidden = ("PYTEST_", "PYTHONPATH")  # of this run, not of those that are asked for
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith(hidden)},
        )

    def run(self, folder: Path, *arguments: str) -> tuple[int, str]:
        """Return the exit code and the output of ``pytest arguments`` in a folder."""
        log = folder / "pytest.log"
        request = {"folder": str(folder), "log": str(log), "arguments": arguments}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()), log.read_text("utf-8")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _run_here(folder: str, log: str, arguments: Sequence[str]) -> int:
    import pytest

    os.chdir(folder)
    sys.path[0] = folder
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    code = int(pytest.main([*READY, *arguments]))
    package = sys.modules.get("lalora_app")
    right = package is None or str(package.__file__).startswith(folder)
    return code if right else WRONG_COPY


def _serve() -> None:
    for name in LIBRARIES:
        import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_run_here(**json.loads(line)))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
