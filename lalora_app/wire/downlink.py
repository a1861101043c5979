"""Downloads without the tensors that a client already holds.

After a valid reply the server assumes that the client holds the tensors of that request. The next
request leaves out unchanged tensors and names them by the hash of their content. A client that
does not hold them refuses at no privacy cost, and the next request holds all tensors.
Privacy: these are the server's own tensors.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from lalora_app.adapter.factors import Adapter, kind, num_bytes
from lalora_app.wire.messages import ARRAYS, DRIFT
from lalora_app.wire.tensors import to_record

LEFT_OUT = "left-out"
Parts = dict[str, Adapter]  # tensors by kind, and the drift


def parts(adapter: Mapping[str, np.ndarray], drift: Mapping[str, np.ndarray]) -> Parts:
    """Return the units that are sent or left out whole: the tensors of each kind, and the drift."""
    found: Parts = {DRIFT: dict(drift)} if drift else {}
    for name, array in adapter.items():
        found.setdefault(kind(name), {})[name] = array
    return found


def content_hash(part: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 over names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, array in sorted(part.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass
class Downlink:
    """The server's record of the tensors that each node holds.

    Attributes:
        bytes: the size of the tensors in each node's last request.
    """

    bytes: dict[int, int] = field(default_factory=dict)
    _held: dict[int, dict[str, str]] = field(default_factory=dict)
    _asked: dict[int, dict[str, str]] = field(default_factory=dict)

    def records(
        self, node: int, adapter: Adapter, drift: Adapter
    ) -> dict[str, ArrayRecord | ConfigRecord]:
        """Return the tensors of a request, and the hashes of the tensors that it leaves out."""
        now = parts(adapter, drift)
        hashes = {part: content_hash(tensors) for part, tensors in now.items()}
        held = self._held.pop(node, {})  # unknown until the node answers
        self._asked[node] = hashes
        left_out = {part: h for part, h in hashes.items() if held.get(part) == h}
        arrays: Adapter = {}
        for part in now.keys() - left_out.keys() - {DRIFT}:
            arrays |= now[part]
        moved = {} if DRIFT in left_out else drift
        self.bytes[node] = num_bytes(arrays) + num_bytes(moved)
        return {
            ARRAYS: to_record(arrays),
            DRIFT: to_record(moved),
            LEFT_OUT: ConfigRecord(dict(left_out)),
        }

    def answered(self, nodes: Iterable[int]) -> None:
        """Record that the nodes of valid replies hold the tensors of their requests."""
        self._held |= {node: self._asked[node] for node in nodes}
