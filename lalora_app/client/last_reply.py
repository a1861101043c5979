"""A client's last reply on disk: a repeated request is answered with the same tensors.

A restarted server may repeat a round. Sending the same tensors again uses no data, so it costs no
privacy budget; training again would cost it twice.
"""

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.adapter.factors import Adapter


def reply_file(folder: Path, dataset: str, client: str) -> Path:
    """Return the file of a client's last reply: one per dataset and client."""
    return folder / "replies" / file_name(dataset, client)


def save_reply(path: Path, request: str, upload: Adapter) -> None:
    """Save a reply in place of the one before, atomically.

    Args:
        path: the file from :func:`reply_file`.
        request: the digest of the request.
        upload: the tensors of the reply.
    """
    with replace_atomically(path) as new:
        save_file(upload, new, metadata={"request": request})


def load_if_same_request(path: Path, request: str) -> Adapter | None:
    """Return the saved reply to the same request; None: it is new, or the file is damaged."""
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError),
        safe_open(path, framework="numpy") as file,
    ):
        if (file.metadata() or {}).get("request") == request:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return None
