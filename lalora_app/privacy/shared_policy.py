"""A site's own conditions for noise that clients share: the table ``[shared-noise]`` of its policy.

Without this table a site with its own data adds all of the noise to each upload itself.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lalora_app.privacy.budget import Limit
from lalora_app.privacy.policy_values import PolicyError, integer, names, number, require_known
from lalora_app.settings.errors import ConfigError

_KEYS = ("max-epsilon-alone", "min-honest", "min-colluding", "peers")
PEER_PREFIX = "lalora-peer:"  # of a site's public key as text
_KEY_BYTES = 32  # of an Ed25519 public key


def peer_text(key: bytes) -> str:
    """Return a site's public key as one word, for the policies of the other sites."""
    return PEER_PREFIX + base64.b64encode(key).decode()


def peer_key(text: str) -> bytes:
    """Return the public key that :func:`peer_text` wrote.

    Raises:
        ValueError: if the text is no such word.
    """
    try:
        key = base64.b64decode(text.removeprefix(PEER_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES or peer_text(key) != text:
        raise ValueError(f"{text!r} must be a line that `lalora credentials peer` printed")
    return key


@dataclass(frozen=True)
class SharedNoise:
    """The conditions under which a site adds only its share of the noise.

    Attributes:
        limit: (ε, δ) of the dataset over all runs if a server opens the site's uploads; the ε of
            the sums has the policy's own limit.
        min_honest: smallest number of honest shares in a sum, h = t - 1 - c.
        min_colluding: smallest number of colluding clients, c, that a run must withstand.
        peers: public keys of the other sites; None: any client counts, also a made-up one.
    """

    limit: Limit
    min_honest: int = 1
    min_colluding: int = 0
    peers: frozenset[bytes] | None = None

    def check_colluding(self, colluding: int) -> None:
        """Check the run's ``privacy.colluding``.

        Raises:
            PolicyError: if the run withstands too few colluding clients.
        """
        if colluding < self.min_colluding:
            raise PolicyError(
                f"privacy.colluding={colluding} must be at least min-colluding={self.min_colluding}"
            )

    def check_cohort(self, honest: int, colluding: int) -> None:
        """Check the numbers of an attempt, before its releases are on the ledger.

        Args:
            honest: the honest shares that are counted on, h.
            colluding: the colluding clients that the attempt withstands, c.

        Raises:
            PolicyError: if one of them is too small.
        """
        self.check_colluding(colluding)
        if honest < self.min_honest:
            raise PolicyError(
                f"{honest} honest shares are counted on, and there must be at least "
                f"min-honest={self.min_honest}"
            )

    def lines(self) -> list[str]:
        """Return the conditions as text, one line per rule."""
        pinned = (
            f"keys of {len(self.peers)} other sites only" if self.peers else "keys of any client"
        )
        return [
            f"noise may be shared, with epsilon-alone up to {self.limit.epsilon:g} at delta "
            f"{self.limit.delta:g}, over all runs",
            f"shared noise needs {self.min_honest} honest shares or more, and withstands "
            f"{self.min_colluding} colluding clients or more",
            f"shared noise takes {pinned}",
        ]


def read_shared_noise(table: Mapping[str, Any], delta: float, source: str) -> SharedNoise:
    """Read the table ``[shared-noise]`` of a policy file.

    Args:
        table: the table.
        delta: δ of the policy's limits.
        source: the file's name, for errors.

    Raises:
        ConfigError: with file, key and value, if the table breaks a rule.
    """
    source = f"{source} shared-noise:"
    if not isinstance(table, dict):
        raise ConfigError(f"{source} must be a table")
    require_known(table, _KEYS, source)
    if "max-epsilon-alone" not in table:
        raise ConfigError(f"{source} max-epsilon-alone is missing: the table must set it")
    most = number(table, "max-epsilon-alone", math.inf, source)
    if not most > 0:
        raise ConfigError(f"{source} max-epsilon-alone={most} must be greater than 0")
    honest, colluding = (
        integer(table, "min-honest", 1, source),
        integer(table, "min-colluding", 0, source),
    )
    found = SharedNoise(Limit(most, delta), honest or 1, colluding or 0, _peers(table, source))
    _check_enough_peers(found, source)
    return found


def _peers(table: Mapping[str, Any], source: str) -> frozenset[bytes] | None:
    listed = names(table, "peers", source)
    if listed is None:
        return None
    if len(listed) < len(table["peers"]):
        raise ConfigError(f"{source} peers must not name a key twice")
    try:
        return frozenset(map(peer_key, listed))
    except ValueError as error:
        raise ConfigError(f"{source} peers: {error}") from error


def _check_enough_peers(found: SharedNoise, source: str) -> None:
    """Check that an attempt with all peers can have the demanded h = t - 1 - c: t ≤ peers + 1."""
    needed = found.min_honest + found.min_colluding
    if found.peers is not None and needed > len(found.peers):
        raise ConfigError(
            f"{source} peers={len(found.peers)} keys must be at least {needed}, the sum of "
            f"min-honest={found.min_honest} and min-colluding={found.min_colluding}"
        )
