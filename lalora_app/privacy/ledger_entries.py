"""One line of the ledger, and how it is read and written in the SQLite table."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lalora_app.privacy.accounting import Release

_COLUMNS = (
    "time, dataset, run, round, sampling_rate, noise_multiplier, count, uid, alone_multiplier"
)


@dataclass(frozen=True)
class LedgerEntry:
    """One line of the ledger.

    Attributes:
        time: time of the reservation, in ISO format, UTC.
        dataset: name of the client's data.
        run: name of the run.
        round: number of the round.
        release: the releases, with the noise of what everyone may see. With shared noise it is the
            noise of the sum.
        uid: the same in every copy of the ledger.
        alone: noise multiplier of the client's upload alone, for shared noise; None: the client's
            own noise is all of the noise, and an upload alone has ``release.noise_multiplier``.
    """

    time: str
    dataset: str
    run: str
    round: int
    release: Release
    uid: str
    alone: float | None = None

    @property
    def release_alone(self) -> Release:
        """The releases with the noise of the upload alone. Limit: ``release`` with own noise."""
        if self.alone is None:
            return self.release
        return replace(self.release, noise_multiplier=self.alone)


def releases_of(entries: Sequence[LedgerEntry]) -> list[Release]:
    """Return the releases as everyone may see them: sums, where noise was shared."""
    return [entry.release for entry in entries]


def releases_alone(entries: Sequence[LedgerEntry]) -> list[Release]:
    """Return the releases as a server sees them that opens every upload of the client.

    Limit: without shared noise, those of :func:`releases_of`.

    Privacy: their ε holds whatever the server and the other clients do.
    """
    return [entry.release_alone for entry in entries]


def share_noise(entries: Sequence[LedgerEntry]) -> bool:
    """Tell whether the noise of any of the entries was shared, so that there are two ε."""
    return any(entry.alone is not None for entry in entries)


def check_alone(release: Release, alone: float | None) -> None:
    """Check that an upload alone has no more noise than the sum that it goes into.

    Raises:
        ValueError: if it has more, or less than none.
    """
    if alone is not None and not 0 <= alone <= release.noise_multiplier:
        raise ValueError(
            f"alone={alone} must be from 0 to the sum's noise multiplier {release.noise_multiplier}"
        )


def write_entry(db: sqlite3.Connection, entry: LedgerEntry) -> None:
    """Add a line to the table."""
    release = entry.release
    row = (entry.time, entry.dataset, entry.run, entry.round)
    numbers = (release.sampling_rate, release.noise_multiplier, release.count)
    db.execute(
        f"INSERT INTO releases ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, *numbers, entry.uid, entry.alone),
    )


def read_entries(
    db: sqlite3.Connection, dataset: str | None = None, run: str | None = None
) -> list[LedgerEntry]:
    """Return the lines of a dataset and run, in the order in which they were written.

    Args:
        db: an open ledger.
        dataset: only lines of this dataset; None: of all.
        run: only lines of this run; None: of all.
    """
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM releases "
        "WHERE (?1 IS NULL OR dataset = ?1) AND (?2 IS NULL OR run = ?2) ORDER BY id",
        (dataset, run),
    )
    return [
        LedgerEntry(time, name, run_, round_, Release(q, z, count), uid, alone)
        for time, name, run_, round_, q, z, count, uid, alone in rows
    ]
