"""Encoded examples in a file on the client's disk: in deployment every message is a new process.

The file is used while its fingerprint is unchanged: names, sizes and times of change of the data's
and the model's files, the keys of the run that decide on the encoding, and the code. Privacy: it
holds private data, so it is written only into a folder that the site names.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.client.site import Site
from lalora_app.data.encoding import Encoded, EncodedImages, EncodedSequences, EncodedTexts
from lalora_app.settings.run_config import Config

_STACK = "pixels."  # prefix of the tensors of images of one size


def _flat(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return {"tokens": tokens, "lengths": torch.tensor([len(row) for row in rows])}


def _rows(tensors: dict[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    tokens = tensors["tokens"].tolist()
    ends = accumulate(tensors["lengths"].tolist(), initial=0)
    return tuple(tuple(tokens[start:end]) for start, end in pairwise(ends))


def _lengths(longest: int, shortest: int) -> dict[str, str]:
    return {"longest": str(longest), "shortest": str(shortest)}


def _packed(encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, str]]:
    match encoded:
        case EncodedTexts(tokens, labels, pad, longest, shortest):
            saved = _flat(tokens) | {"labels": torch.tensor(labels)}
            return saved, {"kind": "texts", "pad": str(pad)} | _lengths(longest, shortest)
        case EncodedSequences(tokens, longest, shortest):
            return _flat(tokens), {"kind": "sequences"} | _lengths(longest, shortest)
        case EncodedImages(stacks, labels, places):
            saved = {f"{_STACK}{i}": stack for i, stack in enumerate(stacks)}
            where = torch.tensor(places).reshape(-1, 2)
            return saved | {"labels": torch.tensor(labels), "places": where}, {"kind": "images"}
    raise TypeError(f"{type(encoded).__name__} must be texts, sequences or images")


def _unpacked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Encoded:
    if metadata["kind"] == "sequences":
        return EncodedSequences(_rows(tensors), int(metadata["longest"]), int(metadata["shortest"]))
    labels = tuple(tensors["labels"].tolist())
    if metadata["kind"] == "images":  # memory-mapped: a batch reads its own rows
        stacks = sum(name.startswith(_STACK) for name in tensors)
        places = tuple((stack, row) for stack, row in tensors["places"].tolist())
        return EncodedImages(tuple(tensors[f"{_STACK}{i}"] for i in range(stacks)), labels, places)
    numbers = (int(metadata[key]) for key in ("pad", "longest", "shortest"))
    return EncodedTexts(_rows(tensors), labels, *numbers)


@dataclass(frozen=True)
class CacheFile:
    """One client's cache file.

    Attributes:
        path: the path of the file; an older file is replaced.
        fingerprint: the fingerprint that a readable file must have.
    """

    path: Path
    fingerprint: str

    def read(self) -> Encoded | None:
        """Return the encoded examples; None: there is no file with this fingerprint."""
        with (
            contextlib.suppress(SafetensorError, OSError, KeyError, ValueError),
            safe_open(self.path, framework="pt") as file,
        ):
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") == self.fingerprint:
                names = file.keys()
                return _unpacked({name: file.get_tensor(name) for name in names}, metadata)
        return None

    def write(self, encoded: Encoded) -> None:
        """Save the examples atomically, readable by this user only."""
        tensors, metadata = _packed(encoded)
        with replace_atomically(self.path, mode=0o700) as new:
            new.touch(mode=0o600)
            save_file(tensors, new, metadata=metadata | {"fingerprint": self.fingerprint})


def cache_file(site: Site, config: Config) -> CacheFile | None:
    """Return a client's file in the folder that its site names; None: the site names no folder.

    Limit: none for one task's examples: their number does not tell whether all examples can take
    part, so all of them are read.
    """
    fingerprint = site.fingerprint(config)
    if site.cache is None or fingerprint is None or site.task is not None:
        return None
    return CacheFile(site.cache / file_name(site.dataset, site.client), fingerprint)
