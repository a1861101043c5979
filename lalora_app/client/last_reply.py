"""A client's last reply, kept: the same request is answered with the same tensors.

What has left the client may leave it again. That is no new look at the data, so it costs nothing;
a round that a restarted server asks for once more would else be paid for twice.
"""

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.adapter.factors import Adapter


def reply_file(folder: Path, dataset: str, client: str) -> Path:
    """Return the file of a client's last reply: one a dataset and client."""
    return folder / "replies" / file_name(dataset, client)


def save_reply(path: Path, request: str, upload: Adapter) -> None:
    """Keep a reply in place of the one before, atomically.

    Args:
        path: from :func:`reply_file`.
        request: digest of all that was asked for.
        upload: the tensors of the reply.
    """
    with replace_atomically(path) as new:
        save_file(upload, new, metadata={"request": request})


def load_if_same_request(path: Path, request: str) -> Adapter | None:
    """Return what the same request was answered with; None: it is new, or the file is damaged."""
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError),
        safe_open(path, framework="numpy") as file,
    ):
        if (file.metadata() or {}).get("request") == request:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return None
