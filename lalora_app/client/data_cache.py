"""Encoded examples kept on the client's disk: in deployment every message is a new process.

A file is used while its fingerprint fits: names, sizes and times of change of the files of data and
model, the keys of the run that encoding depends on, and the code. It holds private data, so it is
kept only where a site names a folder for it.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.client.site import Site
from lalora_app.data.encoding import Encoded, EncodedImages, EncodedSequences, EncodedTexts
from lalora_app.data.sources import stamp
from lalora_app.models.pretrained import revision
from lalora_app.settings.run_config import Config, flatten
from lalora_app.wire.code_version import code_hash

# What decides on how an example is encoded; the device, or how it is trained on, does not.
_KEYS = ("data.", "model.name", "model.task", "model.max-length", "model.image-", "model.weights")
_STACK = "pixels."  # before the number of an image's size
_LIBRARIES = ("transformers", "tokenizers", "pillow")


def fingerprint(config: Config, data_path: str) -> str:
    """Return a SHA-256 of all that encoding a client's own data depends on.

    Args:
        config: of the run.
        data_path: the client's file or folder.
    """
    keys = {key: value for key, value in flatten(config).items() if key.startswith(_KEYS)}
    libraries = [version(library) for library in _LIBRARIES]
    parts = [code_hash(), libraries, keys, stamp(data_path), revision(config.model.name)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _flat(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return {"tokens": tokens, "lengths": torch.tensor([len(row) for row in rows])}


def _rows(tensors: dict[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    tokens = tensors["tokens"].tolist()
    ends = accumulate(tensors["lengths"].tolist(), initial=0)
    return tuple(tuple(tokens[start:end]) for start, end in pairwise(ends))


def _packed(encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, str]]:
    match encoded:
        case EncodedTexts(tokens, labels, pad, longest):
            kept = _flat(tokens) | {"labels": torch.tensor(labels)}
            return kept, {"kind": "texts", "pad": str(pad), "longest": str(longest)}
        case EncodedSequences(tokens, longest):
            return _flat(tokens), {"kind": "sequences", "longest": str(longest)}
        case EncodedImages(stacks, labels, places):
            kept = {f"{_STACK}{i}": stack for i, stack in enumerate(stacks)}
            where = torch.tensor(places).reshape(-1, 2)
            return kept | {"labels": torch.tensor(labels), "places": where}, {"kind": "images"}
    raise TypeError(f"{type(encoded).__name__} must be texts, sequences or images")


def _unpacked(tensors: dict[str, Tensor], said: dict[str, str]) -> Encoded:
    if said["kind"] == "sequences":
        return EncodedSequences(_rows(tensors), int(said["longest"]))
    labels = tuple(tensors["labels"].tolist())
    if said["kind"] == "images":  # mapped: a batch reads its own rows
        stacks = sum(name.startswith(_STACK) for name in tensors)
        places = tuple((stack, row) for stack, row in tensors["places"].tolist())
        return EncodedImages(tuple(tensors[f"{_STACK}{i}"] for i in range(stacks)), labels, places)
    return EncodedTexts(_rows(tensors), labels, int(said["pad"]), int(said["longest"]))


@dataclass(frozen=True)
class CacheFile:
    """One client's file.

    Attributes:
        path: of the file; the one before is replaced.
        fingerprint: that it must have.
    """

    path: Path
    fingerprint: str

    def read(self) -> Encoded | None:
        """Return the examples as they were encoded; None: they were not, or something changed."""
        with (
            contextlib.suppress(SafetensorError, OSError, KeyError, ValueError),
            safe_open(self.path, framework="pt") as file,
        ):
            said = file.metadata() or {}
            if said.get("fingerprint") == self.fingerprint:
                names = file.keys()
                return _unpacked({name: file.get_tensor(name) for name in names}, said)
        return None

    def write(self, encoded: Encoded) -> None:
        """Keep the examples, for this user only, in place of those kept before; atomically."""
        tensors, said = _packed(encoded)
        with replace_atomically(self.path, mode=0o700) as new:
            new.touch(mode=0o600)
            save_file(tensors, new, metadata=said | {"fingerprint": self.fingerprint})


def cache_file(site: Site, config: Config) -> CacheFile | None:
    """Return a client's file in the folder that its site names; None: it names none."""
    if site.cache is None:
        return None
    folder, data_path = site.cache
    name = file_name(site.dataset, site.client)
    return CacheFile(folder / name, fingerprint(config, data_path))
