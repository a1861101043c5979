"""A client's last reply on disk: a repeated request is answered with the same tensors.

A restarted server may repeat a round. Sending the same tensors again uses no data, so it costs no
privacy budget; training again would cost it twice.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.tensor_files import save_tensors


@dataclass(frozen=True)
class SavedReply:
    """The reply to one request.

    Attributes:
        upload: the tensors.
        num_examples: the number of the client's examples. It is saved here so that a repetition
            needs no data; a client's policy decides whether it is sent.
    """

    upload: Adapter
    num_examples: int


def reply_file(folder: Path, dataset: str, client: str) -> Path:
    """Return the file of a client's last reply: one per dataset and client."""
    return folder / "replies" / file_name(dataset, client)


def save_reply(path: Path, request: str, reply: SavedReply) -> None:
    """Save a reply in place of the one before, atomically.

    Args:
        path: the file from :func:`reply_file`.
        request: the digest of the request.
        reply: the reply.
    """
    metadata = {"request": request, "examples": str(reply.num_examples)}
    with replace_atomically(path) as new:
        save_tensors(reply.upload, new, metadata)


def load_if_same_request(path: Path, request: str) -> SavedReply | None:
    """Return the saved reply to the same request; None: it is new, or the file is damaged."""
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError, KeyError),
        safe_open(path, framework="numpy") as file,
    ):
        metadata = file.metadata() or {}
        if metadata.get("request") == request:
            upload = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return SavedReply(upload, int(metadata["examples"]))
    return None
