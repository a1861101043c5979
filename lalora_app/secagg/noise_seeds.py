"""Shares of the seeds of a client's removable noise, joined to one value per client.

The seeds s_1 … s_J of a chain are split like the seed of the mask. The seed of component 0 is not
split, because nobody may remove that component. A client holds J shares of every client, joined;
in the stage "unmask" it gives one of them, which its own count of missing clients decides.
"""

import hashlib
from collections.abc import Mapping, Sequence

from lalora_app.secagg import masks
from lalora_app.shared_noise import seeded
from lalora_app.shared_noise.shares import Cohort
from lalora_app.wire.tensors import WireError

SHARE_BYTES = 52  # of a secret of 32 bytes, as Flower pads and numbers it


def share_of(joined: bytes, number: int) -> bytes:
    """Return the share of the seed s_number, from 1, out of a client's joined shares."""
    return joined[(number - 1) * SHARE_BYTES : number * SHARE_BYTES]


def commitment(seeds: Sequence[bytes]) -> bytes:
    """Return SHA-256 of s_J, or nothing if there is no removable component."""
    return hashlib.sha256(seeds[-1]).digest() if len(seeds) > 1 else b""


def verified(shares: Mapping[int, bytes], number: int, cohort: Cohort, committed: bytes) -> bytes:
    """Return the seed s_number of one client.

    Args:
        shares: share per client that held it.
        number: number of the seed, from 1 to J.
        cohort: clients, threshold, and colluding clients of the attempt.
        committed: the client's :func:`commitment`.

    Raises:
        WireError: if there are too few shares, or the chain does not end as the client has said.
    """
    seed = masks.reconstruct_seed(shares, cohort.threshold)
    if seeded.commitment(seed, number, cohort) != committed:
        raise WireError("a reconstructed noise seed differs from its client's commitment")
    return seed
