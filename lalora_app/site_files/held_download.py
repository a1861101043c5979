"""The server's tensors on the client's disk, so that the next request can leave them out."""

import contextlib
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.tensor_files import save_tensors
from lalora_app.wire.downlink import LEFT_OUT, Parts, content_hash, parts
from lalora_app.wire.messages import ARRAYS, DRIFT
from lalora_app.wire.tensors import WireError, to_record


class HeldError(WireError):
    """The client does not hold the tensors that the server left out."""


def download_file(folder: Path, dataset: str, client: str, run: str) -> Path:
    """Return the file of a client's last download in a run."""
    return folder / "downloads" / file_name(dataset, client, run)


def save_download(path: Path, adapter: Adapter, drift: Adapter) -> None:
    """Save the client's last download in place of the one before, atomically."""
    named = {f"{ARRAYS}/{name}": array for name, array in adapter.items()}
    named |= {f"{DRIFT}/{name}": array for name, array in drift.items()}
    with replace_atomically(path) as new:
        save_tensors(named, new)


def _saved_parts(path: Path) -> Parts:
    """Return the saved tensors; none if the file is missing or damaged."""
    with contextlib.suppress(SafetensorError, OSError, ValueError):
        named = [(*name.split("/", 1), array) for name, array in load_file(path).items()]
        adapter, drift = (
            {name: array for where, name, array in named if where == record}
            for record in (ARRAYS, DRIFT)
        )
        return parts(adapter, drift)
    return {}


def completed(content: RecordDict, path: Path) -> RecordDict:
    """Return a request together with the tensors that it left out.

    Limit: a request that leaves nothing out is returned unchanged.

    Args:
        content: the request's records, which are not trusted.
        path: the file from :func:`download_file`.

    Raises:
        HeldError: if the client does not hold these tensors bit for bit.
    """
    left_out = content.config_records.get(LEFT_OUT, ConfigRecord())
    if not left_out:
        return content
    saved, whole = _saved_parts(path), RecordDict(dict(content.items()))
    for part, wanted in left_out.items():
        tensors = saved.get(part, {})
        if not tensors or content_hash(tensors) != wanted:
            raise HeldError(f"{part} was left out, and is not held")
        record = DRIFT if part == DRIFT else ARRAYS
        sent = whole.array_records.get(record, ArrayRecord())
        whole[record] = ArrayRecord({**sent, **to_record(tensors)})
    return whole
