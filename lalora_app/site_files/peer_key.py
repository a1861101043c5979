"""The file with a site's private signing key, by which the other sites know its keys of a run."""

import contextlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from lalora_app.secagg.peers import new_identity
from lalora_app.settings.errors import ConfigError

_LAW = "the file that `lalora credentials peer` wrote"


def make_peer_key(path: Path) -> Ed25519PrivateKey:
    """Write a new private signing key, for the site's owner only, and return it.

    The file is there as a whole or not at all. Its folder is made if missing.

    Args:
        path: the new file.

    Raises:
        ConfigError: if the file exists, for a key is never replaced; or if it cannot be written.
    """
    identity = new_identity()
    content = identity.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(part, content)
        os.link(part, path)  # refuses an existing name, which a rename would replace
    except OSError as error:
        raise ConfigError(f"{path} must be a new file: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return identity


def _write_new(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_peer_key(path: Path) -> Ed25519PrivateKey:
    """Read a private signing key.

    Raises:
        ConfigError: if the file cannot be read, or holds no such key.
    """
    try:
        identity = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(
            f"node config peer-key={path} must be {_LAW}: {error.strerror}"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise ConfigError(f"node config peer-key={path} must be {_LAW}") from error
    if not isinstance(identity, Ed25519PrivateKey):
        raise ConfigError(f"node config peer-key={path} must be {_LAW}")
    return identity
