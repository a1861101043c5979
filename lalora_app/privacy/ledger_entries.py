"""The SQLite table of the ledger: its lines, and the upgrade of ledgers of older versions."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from lalora_app.privacy.accounting import Release, epsilon

WHOLE = ""  # the part of a line that any example of the dataset may be in
_COLUMNS = (
    "time, dataset, run, round, sampling_rate, noise_multiplier, count, uid, alone_multiplier, "
    "part, seeded"
)
_MOST_LISTS = 64  # of lines, of which each costs an ε


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
        part: the examples that the releases read: a division's name, "/" and a number; empty: all.
        seeded: whether the noise was drawn from the run's seed, which the server knows; None: a
            line of an older version, which did not write it down. It counts as secret noise.
    """

    time: str
    dataset: str
    run: str
    round: int
    release: Release
    uid: str
    alone: float | None = None
    part: str = WHOLE
    seeded: bool | None = False

    @property
    def release_seen(self) -> Release:
        """The releases with the noise that hides them; seeded noise hides nothing."""
        return replace(self.release, noise_multiplier=0.0) if self.seeded else self.release

    @property
    def release_alone(self) -> Release:
        """The releases with the noise of the upload alone. Limit: the same with own noise."""
        if self.alone is None or self.seeded:
            return self.release_seen
        return replace(self.release, noise_multiplier=self.alone)


def releases_drawn(entries: Sequence[LedgerEntry]) -> list[Release]:
    """Return the releases with the noise that was drawn, whoever knows it.

    Privacy: for the schedule of a run with seeded noise only, which promises nothing.
    """
    return [entry.release for entry in entries]


def releases_of(entries: Sequence[LedgerEntry]) -> list[Release]:
    """Return the releases as everyone may see them: sums, where noise was shared.

    Limit: releases with seeded noise have none, so that their ε is infinite.
    """
    return [entry.release_seen for entry in entries]


def releases_alone(entries: Sequence[LedgerEntry]) -> list[Release]:
    """Return the releases as a server sees them that opens every upload of the client.

    Limit: without shared noise, those of :func:`releases_of`.

    Privacy: their ε holds whatever the server and the other clients do.
    """
    return [entry.release_alone for entry in entries]


def may_share(one: str, other: str) -> bool:
    """Return whether an example can be in both parts of a dataset; true where this is not known.

    Only two parts of one division are disjoint.
    """
    if not one or not other or one == other:
        return True
    return one.partition("/")[0] != other.partition("/")[0]


def compositions(entries: Sequence[LedgerEntry], part: str = WHOLE) -> list[list[LedgerEntry]]:
    """Return lists of lines, one of which holds all lines that any one example can have been in.

    An example is in one part of each division, so there is a list for each combination of parts,
    one of each division: the lines of these parts, and those of all examples.

    Args:
        entries: lines of one dataset.
        part: only examples of this part.

    Limit: without parts, all lines in one list. Divisions that would make more than 64 lists, in
    the order of their first lines, are not divided: their lines are in all lists, and ε is larger.

    Privacy: the ε of a dataset is the largest of the lists (parallel composition of disjoint data).
    A line added to a part changes no list but those of this part, so a check of these is enough.
    """
    kept = [entry for entry in entries if not part or may_share(entry.part, part)]
    divisions: dict[str, set[str]] = {}
    for entry in kept:
        if entry.part:
            divisions.setdefault(entry.part.partition("/")[0], set()).add(entry.part)
    lists = [kept]
    for parts in divisions.values():
        if len(lists) * len(parts) <= _MOST_LISTS:
            pairs = product(lists, sorted(parts))
            lists = [[e for e in lines if may_share(e.part, own)] for lines, own in pairs]
    return lists


def parts_of(entries: Sequence[LedgerEntry]) -> list[str]:
    """Return the names of all parts that lines have; nothing without parts."""
    return sorted({entry.part for entry in entries if entry.part})


ReleasesOf = Callable[[Sequence[LedgerEntry]], list[Release]]


def worst_releases(
    entries: Sequence[LedgerEntry], delta: float, of: ReleasesOf = releases_of, part: str = WHOLE
) -> list[Release]:
    """Return the releases of the example that has spent most, by its ε.

    Args:
        entries: lines of one dataset.
        delta: δ of the ε.
        of: which noise the lines count with, such as :func:`releases_alone`.
        part: only examples of this part.

    Limit: without parts, the releases of all lines.
    """
    return max(map(of, compositions(entries, part)), key=lambda releases: epsilon(releases, delta))


def share_noise(entries: Sequence[LedgerEntry]) -> bool:
    """Return whether clients shared the noise of any entry; the entry's dataset then has two ε."""
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
        f"INSERT INTO releases ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, *numbers, entry.uid, entry.alone, entry.part, entry.seeded),
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
        LedgerEntry(
            *(time, name, run_, round_, Release(q, z, count), uid),
            alone=alone,
            part=part or WHOLE,
            seeded=None if known is None else bool(known),
        )
        for time, name, run_, round_, q, z, count, uid, alone, part, known in rows
    ]


SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    uid TEXT,
    alone_multiplier REAL,
    part TEXT,
    seeded INTEGER
);
CREATE INDEX IF NOT EXISTS releases_of ON releases (dataset, run);
"""
# Older ledgers have no uid. Two copies that are upgraded apart get different ones, so that their
# common lines count twice after a merge.
_ADD_UIDS = """
BEGIN IMMEDIATE;
UPDATE releases SET uid = lower(hex(randomblob(16))) WHERE uid IS NULL;
CREATE UNIQUE INDEX IF NOT EXISTS release_names ON releases (uid);
COMMIT;
"""


# Columns that older ledgers lack, NULL in their lines: all noise was the client's own, the releases
# read all examples, and whether noise was seeded is not known.
_ADDED = {"uid": "TEXT", "alone_multiplier": "REAL", "part": "TEXT", "seeded": "INTEGER"}


def create(db: sqlite3.Connection) -> None:
    """Make the table if it is missing, and give an older ledger its columns and uids."""
    db.executescript(SCHEMA)
    known = {column[1] for column in db.execute("PRAGMA table_info(releases)")}
    for name in sorted(_ADDED.keys() - known):
        with suppress(sqlite3.OperationalError):  # another process has added the column already
            db.execute(f"ALTER TABLE releases ADD COLUMN {name} {_ADDED[name]}")
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'release_names'").fetchone():
        db.executescript(_ADD_UIDS)
