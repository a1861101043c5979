"""A client's hidden states of the model's frozen part, for ``model.prefix-cache``.

In deployment every message is a new process, so without a folder they serve one round only.
Privacy: they are private data, so they are written only into a folder that the site names.
"""

import hashlib
import json
import logging
from functools import cache
from pathlib import Path

from lalora_app.adapter.atomic_files import file_name
from lalora_app.blocks.kept_states import (
    FILE_BYTES,
    MEMORY_BYTES,
    KeptStates,
    StatesInFile,
    StatesInMemory,
    room_for,
)
from lalora_app.blocks.prefix import FrozenPart
from lalora_app.blocks.with_states import WithStates, size_of
from lalora_app.client.site import Site
from lalora_app.data.encoding import Encoded
from lalora_app.models.backbone import Backbone

_log = logging.getLogger("flwr")
_IN_MEMORY = StatesInMemory()  # of all clients of this process


@cache
def _say_once(line: str) -> None:
    _log.info("LaLoRA client: %s", line)


def _states_file(folder: Path, site: Site, prefix: FrozenPart, sizes: list[int]) -> KeptStates:
    """Return the site's file of hidden states; or the memory, if it cannot be opened."""
    path = folder / file_name(site.dataset, site.client)
    name = hashlib.sha256(json.dumps([prefix.fingerprint, sizes]).encode()).digest()
    try:
        kept = StatesInFile(path.with_suffix(".states"), name, sizes)
    except OSError as error:
        _say_once(f"the prefix cache is kept in memory: data-cache cannot be written: {error}")
        return _IN_MEMORY
    if kept.emptied:
        _say_once("the prefix cache is of other weights, settings or data, and is made anew")
    return kept


def with_states(model: Backbone, encoded: Encoded, site: Site) -> Encoded:
    """Return a client's examples with the hidden states of the model's frozen part.

    They are kept in the folder that the site names, otherwise in the memory of this process.

    Limit: without ``model.prefix-cache`` the examples are returned unchanged.

    Privacy: the states are private data, and only the site's own folder ever holds them on a disk.
    """
    prefix = model.prefix
    if prefix is None:
        return encoded
    sizes = [size_of(encoded, prefix, index) for index in range(len(encoded))]
    limit = MEMORY_BYTES if site.cache is None else FILE_BYTES
    if (room := room_for(sizes, limit)) < len(sizes):
        _say_once(
            f"the prefix cache holds {room} of {len(sizes)} examples in its {limit >> 30} GiB; the "
            "others are computed whenever they are drawn"
        )
    kept = _states_file(site.cache, site, prefix, sizes) if site.cache else _IN_MEMORY
    return WithStates(encoded, prefix, model.states, kept)
