"""Execute the shell blocks of docs/deployment.md, unchanged, on this machine.

The info string of a block gives its kind. ``sh environment`` is prepended to every other block;
``sh`` and ``sh run=NAME`` run to their end; ``sh service=NAME`` runs until it is stopped. All
processes of a guide have its own HOME and FLWR_HOME, by which they are found and ended.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "deployment.md"
_BLOCK = re.compile(r"^```sh(?: +(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SITES = 5  # number of sites that get a port; the guide itself has three sites
_GRACE = 60.0  # seconds for a process to end without SIGKILL


@dataclass(frozen=True)
class Block:
    """A fenced shell block: ``kind`` is environment, run or service; plain ones are runs."""

    kind: str
    name: str
    text: str


def blocks(path: Path = GUIDE) -> list[Block]:
    """Return the shell blocks of a document, in order."""
    found = []
    for label, text in _BLOCK.findall(path.read_text("utf-8")):
        kind, _, name = (label or "run").partition("=")
        found.append(Block(kind, name, text))
    return found


def free_ports(number: int) -> list[int]:
    """Return TCP ports that are free at the moment."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; raise TimeoutError with its description."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds} s")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Guide:
    """One deployment, created by the guide's blocks in ``folder``.

    Args:
        folder: folder of HOME, keys, state and logs.
        variables: additional environment variables, such as REHEARSAL.
    """

    folder: Path
    variables: dict[str, str]
    services: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    _one: threading.RLock = field(default_factory=threading.RLock)  # a supervisor starts services

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ports = self._ports()
        self.blocks = blocks()
        (self.before,) = (b.text for b in self.blocks if b.kind == "environment")
        self.environment = os.environ | {
            "HOME": str(self.folder),
            "DEPLOY": str(self.folder / "deploy"),
            "FLWR_HOME": str(self.folder / "flwr"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **ports,
            **self.variables,
        }

    def _ports(self) -> dict[str, str]:
        """Return the ports of this folder, equal after a restart because the nodes know them."""
        file = self.folder / "ports.json"
        if not file.exists():
            names = ("PORT", *(f"PORT_{i}" for i in range(SITES)))
            ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
            file.write_text(json.dumps(ports), "utf-8")
        known: dict[str, str] = json.loads(file.read_text("utf-8"))
        return known

    @property
    def state(self) -> Path:
        """The guide's $DEPLOY."""
        return self.folder / "deploy"

    def log(self, name: str) -> str:
        """Return the output of a block so far."""
        file = self.folder / f"{name}.log"
        return file.read_text("utf-8", errors="replace") if file.exists() else ""

    def _popen(self, text: str, log: str) -> subprocess.Popen[bytes]:
        script = f"set -euo pipefail\n{self.before}\n{text}"
        with (self.folder / f"{log}.log").open("ab") as file:
            return subprocess.Popen(
                ["bash", "-c", script],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, text: str, *, log: str = "commands", timeout: float = 600.0) -> str:
        """Run a block to its end and return its output.

        Raises:
            RuntimeError: if it fails, with the end of its log.
        """
        code = self._popen(text, log).wait(timeout)
        if code != 0:
            raise RuntimeError(f"exit code {code} of\n{text}\n{self.log(log)[-4000:]}")
        return self.log(log)

    def start(self, name: str, text: str | None = None) -> None:
        """End a service if it runs, and start it with its last text or a new text."""
        with self._one:
            self.stop(name)
            self.texts[name] = text or self.texts[name]
            self.services[name] = self._popen(self.texts[name], name)

    def ready(self, timeout: float = 300.0) -> None:
        """Wait until every service listens at its port; raise RuntimeError if one has ended."""
        ports = {"superlink": "PORT"} | {f"site-{i}": f"PORT_{i}" for i in range(SITES)}
        for name, service in self.services.items():
            port = int(self.environment[ports[name]])
            until(lambda p=port, s=service: _listens(p) or s.poll() is not None, timeout, name)
            if service.poll() is not None:
                raise RuntimeError(f"{name} ended: {self.log(name)[-4000:]}")

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """End a service and all processes that it has started."""
        with self._one:
            service = self.services.pop(name, None)
        if service is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.pid, signal.SIGKILL)
        service.wait()

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Return this guide's processes with the given word in their command line."""
        found = []
        for process in psutil.process_iter(["environ", "cmdline"]):
            home = (process.info["environ"] or {}).get("HOME")
            if home == str(self.folder) and word in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    def close(self) -> None:
        """End all processes of the guide."""
        for name in list(self.services):
            self.stop(name)
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_GRACE)


@contextlib.contextmanager
def guide(folder: Path, **variables: str) -> Iterator[Guide]:
    """Return a guide; its processes end with the ``with`` block."""
    made = Guide(folder, variables)
    try:
        yield made
    finally:
        made.close()


def execute(made: Guide, names: set[str] | None = None) -> Iterator[Block]:
    """Execute the guide from start to end; yield every block after its execution.

    Args:
        made: the deployment.
        names: names of the ``run=`` blocks to execute; None means all.
    """
    for block in made.blocks:
        if block.kind == "service":
            made.start(block.name, block.text)
        elif block.kind == "run" and (not block.name or names is None or block.name in names):
            made.ready()
            made.run(block.text, log=block.name or "commands")
        yield block
