"""The client's ledger: an SQLite file in which every release is committed before it is drawn."""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lalora_app.privacy.accounting import Release, calibrate, epsilon

_SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0)
);
CREATE INDEX IF NOT EXISTS releases_of ON releases (dataset, run);
"""
_WAIT = 120.0  # seconds that a process waits for another one's transaction


class BudgetError(RuntimeError):
    """A limit would be exceeded; nothing was spent."""


@dataclass(frozen=True)
class Limit:
    """A promise (ε, δ) that no sequence of releases may break."""

    epsilon: float
    delta: float


class Reservation:
    """Releases that the ledger has counted: the private step draws them one by one.

    The mechanism takes its sampling rate and noise multiplier from here, so that it runs with
    what was written down, and no more often.
    """

    def __init__(self, release: Release):
        self.sampling_rate = release.sampling_rate
        self.noise_multiplier = release.noise_multiplier
        self._left = release.count

    def take(self) -> None:
        """Use one of the counted releases.

        Raises:
            BudgetError: if all of them are used.
        """
        if self._left == 0:
            raise BudgetError("every release that the ledger has counted is used")
        self._left -= 1


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    time: str
    dataset: str
    run: str
    round: int
    release: Release


class Ledger:
    """Append-only book of releases, shared by processes and kept over restarts and runs.

    Args:
        path: the SQLite file; it and its folder are made if missing.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            db.executescript(_SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # isolation_level=None: transactions begin and end where this module says so.
        db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)
        try:
            # EXTRA also syncs the folder after a commit: FULL may lose it to a power cut.
            db.execute("PRAGMA synchronous = EXTRA")
            yield db
        finally:
            db.close()

    @contextmanager
    def _exclusive(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def entries(self, dataset: str | None = None, run: str | None = None) -> list[Entry]:
        """Return the lines of a dataset and run; None means all of them."""
        with self._open() as db:
            return _read(db, dataset, run)

    def releases(self, dataset: str, run: str | None = None) -> list[Release]:
        """Return what has been released about a dataset, in one run or in all."""
        return [entry.release for entry in self.entries(dataset, run)]

    def reserve(
        self,
        dataset: str,
        run: str,
        round_: int,
        release: Release,
        *,
        planned: int,
        run_limit: Limit,
        node_limit: Limit,
    ) -> Reservation:
        """Commit ``release`` durably, then hand out the right to draw it.

        Args:
            dataset: the client's name of its data; composition is over all of its lines.
            run: stable over restarts and resumes.
            round_: for the reader of the ledger.
            release: what the round is about to draw.
            planned: releases like it from now to the end of the run, this round's included; a
                run that a limit cannot see to its end is refused at once.
            run_limit: what all lines of this run may sum up to.
            node_limit: what all lines of this dataset may sum up to.

        Raises:
            BudgetError: if a limit would be exceeded; nothing is written then.
        """
        count = max(planned, release.count)
        plan = Release(release.sampling_rate, release.noise_multiplier, count)
        with self._exclusive() as db:
            for limit, scope in ((run_limit, run), (node_limit, None)):
                past = [entry.release for entry in _read(db, dataset, scope)]
                _check(past, plan, limit, "run" if scope else "node")
            now = datetime.now(UTC).isoformat(timespec="seconds")
            row = (now, dataset, run, round_)
            numbers = (release.sampling_rate, release.noise_multiplier, release.count)
            db.execute(
                "INSERT INTO releases (time, dataset, run, round, sampling_rate, "
                "noise_multiplier, count) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*row, *numbers),
            )
        return Reservation(release)


def _read(db: sqlite3.Connection, dataset: str | None, run: str | None) -> list[Entry]:
    rows = db.execute(
        "SELECT time, dataset, run, round, sampling_rate, noise_multiplier, count FROM releases "
        "WHERE (?1 IS NULL OR dataset = ?1) AND (?2 IS NULL OR run = ?2) ORDER BY id",
        (dataset, run),
    )
    return [Entry(t, d, r, n, Release(q, z, c)) for t, d, r, n, q, z, c in rows]


def _check(past: list[Release], plan: Release, limit: Limit, whose: str) -> None:
    if math.isinf(limit.epsilon):
        return
    spent = epsilon([*past, plan], limit.delta)
    if spent > limit.epsilon:
        raise BudgetError(
            f"the {whose}'s epsilon would be {spent:.3f}, and must be at most {limit.epsilon}"
        )


def noise_for(past: list[Release], limit: Limit, *, sampling_rate: float, steps: int) -> float:
    """Return the noise multiplier for the rest of a run: constant as long as all goes as planned.

    Args:
        past: the run's releases so far.
        limit: the run's promise; ε = inf gives 0.
        sampling_rate: q of the next releases.
        steps: planned releases from now to the end of the run, this round's included.

    If releases were lost on the way (a killed client, a repeated round), the rest gets more noise
    instead of more ε.

    Raises:
        BudgetError: if the past leaves nothing to spend.
    """
    if past and past[-1].sampling_rate == sampling_rate:
        last = past[-1].noise_multiplier
        planned = Release(sampling_rate, last, steps)
        if epsilon([*past, planned], limit.delta) <= limit.epsilon:
            return last
    try:
        return calibrate(
            limit.epsilon, limit.delta, sampling_rate=sampling_rate, steps=steps, past=past
        )
    except ValueError as error:
        raise BudgetError(str(error)) from error
