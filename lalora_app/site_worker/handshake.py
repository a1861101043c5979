"""Where the site worker listens, and who may talk to it: this user, code and node config only.

Privacy: a message's process and the site worker exchange private data in log lines. So the folder
must be private, the socket must be this user's own, and each side asks the kernel for the user of
the other side.
"""

import hashlib
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

from lalora_app.adapter.atomic_files import make_folder
from lalora_app.settings.errors import ConfigError
from lalora_app.wire.code_version import code_hash

READY, OTHER = b"ready", b"other code, node config or environment"
LOG, CONTENT = b"L", b"C"  # first byte of what the site worker sends
IDLE_MINUTES = 10.0  # default of worker-idle
_LONGEST = 103 if sys.platform == "darwin" else 107  # bytes of the path of a Unix socket
# Environment variables that decide on computation and files; a process keeps those of its start.
_VARIABLES = ("OMP_", "MKL_", "CUDA_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "LALORA_")
_LIBRARIES = ("flwr", "numpy", "opacus", "peft", "safetensors", "timm", "torch", "transformers")


class UnusableError(Exception):
    """The site worker cannot be used; the text is the reason, for the site's own log."""


def idle_seconds(node: Mapping[str, object]) -> float | None:
    """Return after how many idle seconds a site worker ends; None: the site keeps none.

    Raises:
        ConfigError: if ``worker`` or ``worker-idle`` breaks its law.
    """
    wanted, idle = node.get("worker", False), node.get("worker-idle", IDLE_MINUTES)
    if not isinstance(wanted, bool):
        raise ConfigError(f"node config worker={wanted!r} must be true or false")
    if "worker-idle" in node and not wanted:
        raise ConfigError(f"node config worker-idle={idle!r} needs worker=true")
    if isinstance(idle, bool) or not isinstance(idle, int | float) or not 0 < idle < 1e6:
        raise ConfigError(f"node config worker-idle={idle!r} must be a number of minutes above 0")
    return 60.0 * idle if wanted else None


def private_folder(folder: Path) -> Path:
    """Return a site's state folder, made if missing, after checking that nobody else can enter it.

    Raises:
        UnusableError: if the system has no Unix sockets, the folder is another user's, or others
            may enter it.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise UnusableError(f"Python has no Unix sockets on {sys.platform}")
    make_folder(folder, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise UnusableError(f"the state folder {folder} belongs to another user")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise UnusableError(f"the state folder {folder} has mode {mode:o}, and must have 700")
    return folder


def socket_path(folder: Path) -> Path:
    """Return the path of the site worker's socket.

    Raises:
        UnusableError: if it is longer than the system allows.
    """
    path = folder / "worker.sock"
    size = len(os.fsencode(path))
    if size > _LONGEST:
        raise UnusableError(f"the path {path} has {size} bytes, and must have at most {_LONGEST}")
    return path


def require_own_socket(path: Path) -> bool:
    """Tell whether there is a socket, after checking that it is this user's own and no link.

    Raises:
        UnusableError: if the file is a link, no socket, or another user's.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(found.st_mode):
        raise UnusableError(f"{path} is no socket")
    if found.st_uid != os.geteuid():
        raise UnusableError(f"{path} belongs to another user")
    return True


def require_own_peer(connected: socket.socket) -> None:
    """Check that the process at the other end of a socket is this user's.

    Limit: where the system does not tell (macOS), the owner of folder and socket must do.

    Raises:
        UnusableError: if it is another user's.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("3i", credentials)  # pid, uid, gid
    if user != os.geteuid():
        raise UnusableError(f"the process at the other end belongs to the user {user}")


def as_connection(connected: socket.socket) -> Connection:
    """Return a socket as a connection that keeps the borders of what is sent."""
    return Connection(connected.detach())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def identity(node: Mapping[str, object]) -> bytes:
    """Return a hash of everything that both processes must have in common.

    It covers code, libraries, node config, working directory, and the environment variables that
    decide on computation and files.

    Args:
        node: the node config.
    """
    variables = {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES) or k == "HOME"}
    libraries = [sys.executable, *map(_version, _LIBRARIES)]
    parts = [
        code_hash(),
        libraries,
        sorted(node.items()),
        str(Path.cwd()),
        sorted(variables.items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest().encode()
