"""The client's ledger: an SQLite file; every release is committed before its noise is drawn."""

import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack

from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import BudgetError, Limit, check_limit
from lalora_app.privacy.ledger_entries import (
    WHOLE,
    LedgerEntry,
    check_alone,
    compositions,
    create,
    read_entries,
    releases_alone,
    releases_drawn,
    releases_of,
    write_entry,
)
from lalora_app.settings.names import full_path

_NAMED = "SELECT 1 FROM releases WHERE uid = ?"
_WAIT = 120.0  # seconds to wait for the transaction of another process


class LedgerBusyError(RuntimeError):
    """Another process kept the ledger locked for too long; nothing was written."""


class Reservation:
    """Releases that are on the ledger; the private step takes them one by one.

    The mechanism reads sampling rate and noise multiplier from here, so that it runs with the
    values of the ledger and not more often than the ledger says.
    """

    def __init__(self, release: Release):
        self.sampling_rate = release.sampling_rate
        self.noise_multiplier = release.noise_multiplier
        self._left = release.count

    def take(self) -> None:
        """Use one of the counted releases.

        Raises:
            BudgetError: if all counted releases are used.
        """
        if self._left == 0:
            raise BudgetError("all releases of this reservation are used")
        self._left -= 1


class Limits(TypedDict):
    """The limits of a round, see :meth:`Ledger.check`."""

    planned: int
    run_limit: Limit
    node_limit: Limit
    later: NotRequired[Sequence[Release]]
    max_rounds: NotRequired[int | None]
    per_day: NotRequired[int | None]
    alone: NotRequired[float | None]
    alone_limit: NotRequired[Limit | None]
    part: NotRequired[str]
    seeded: NotRequired[bool]


class Ledger:
    """Append-only list of releases, shared by processes and kept over restarts and runs.

    Args:
        path: the SQLite file; made if missing, with its folder.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            create(db)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # isolation_level=None: this module begins and ends transactions explicitly.
        db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)
        try:
            # EXTRA also syncs the folder after a commit; with FULL a power cut may undo the commit.
            db.execute("PRAGMA synchronous = EXTRA")
            yield db
        except sqlite3.OperationalError as error:
            if _is_busy(error):
                raise LedgerBusyError(
                    f"{self.path} stayed locked by another process for {_WAIT:g} s"
                ) from error
            raise
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

    def entries(self, dataset: str | None = None, run: str | None = None) -> list[LedgerEntry]:
        """Return the lines of a dataset and run; None: of all."""
        with self._open() as db:
            return read_entries(db, dataset, run)

    def releases(self, dataset: str, run: str | None = None) -> list[Release]:
        """Return the releases of a dataset, of all its parts, in one run or in all (None).

        They have the noise that was drawn, also where it was seeded.
        """
        return releases_drawn(self.entries(dataset, run))

    def damage(self) -> str:
        """Return SQLite's description of the file's damage; an empty text: no damage."""
        try:
            with self._open() as db:
                found = str(db.execute("PRAGMA integrity_check").fetchone()[0])
        except sqlite3.DatabaseError as error:  # too damaged to be checked
            return str(error)
        return "" if found == "ok" else found

    def merge(self, other: "Ledger") -> list[LedgerEntry]:
        """Add the lines of another ledger that are missing here; return them.

        Lines are compared by ``uid``: a line in both ledgers counts once, and two releases with
        equal values count twice.
        """
        with self._exclusive() as db:
            known = {entry.uid for entry in read_entries(db)}
            new = [entry for entry in other.entries() if entry.uid not in known]
            for entry in new:
                write_entry(db, entry)
        return new

    def check(
        self,
        dataset: str,
        run: str,
        release: Release,
        *,
        planned: int,
        run_limit: Limit,
        node_limit: Limit,
        later: Sequence[Release] = (),
        max_rounds: int | None = None,
        per_day: int | None = None,
        alone: float | None = None,
        alone_limit: Limit | None = None,
        part: str = WHOLE,
        seeded: bool = False,
    ) -> list[LedgerEntry]:
        """Check that :meth:`reserve` would not refuse, and write nothing.

        Args:
            dataset: name of the client's data in the ledger; ε is composed over all its lines.
            run: the run's name, stable over restarts and resumes.
            release: the releases of this round.
            planned: number of such releases from this round to the end of the run; a run that
                cannot end within the limits is refused at its first round.
            run_limit: limit of all lines of this run and dataset.
            node_limit: limit of all lines of this dataset.
            later: releases of another kind that the run plans after these.
            max_rounds: largest number of lines of this run and dataset; None: any number.
            per_day: largest number of rounds of this dataset in 24 hours; None: any number.
            alone: noise multiplier of the client's upload alone, if the noise of ``release`` is
                shared by the clients; None: all of it is the client's own.
            alone_limit: limit of ε-alone: of all lines of this dataset, each with the noise of its
                upload alone; None: no limit.
            part: the part of the dataset that the releases read; empty: all of it.
            seeded: whether the noise is seeded; it then counts for the limit of the run only.

        Returns:
            The lines of the dataset with which the checks were made.

        Raises:
            BudgetError: if a limit would be exceeded; the text names the limit and which ε.
            LedgerBusyError: if another process keeps the file locked.
            ValueError: if ``alone`` is more noise than that of the release.
        """
        check_alone(release, alone)
        plan = replace(release, count=max(planned, release.count))
        seen = self.entries(dataset)
        own = [entry for entry in seen if entry.run == run]
        _check_run(own, max_rounds)
        _check_day(seen, datetime.now(UTC), per_day)
        for lines in compositions(own, part):
            of_run = releases_drawn(lines) if seeded else releases_of(lines)
            check_limit([*of_run, *later], plan, run_limit, "run")
        plan, alone = (replace(plan, noise_multiplier=0.0), None) if seeded else (plan, alone)
        for lines in compositions(seen, part):
            check_limit([*releases_of(lines), *later], plan, node_limit, "node")
            if alone_limit is not None:
                _check_alone_limit([*releases_alone(lines), *later], plan, alone, alone_limit)
        return seen

    def reserve(
        self,
        dataset: str,
        run: str,
        round_: int,
        release: Release,
        *,
        uid: str | None = None,
        **limits: Unpack[Limits],
    ) -> Reservation:
        """Commit ``release`` durably, then return the right to draw it.

        Args:
            dataset: name of the client's data in the ledger.
            run: the run's name.
            round_: number of the round, for readers of the ledger only.
            release: the releases of this round.
            uid: a name that no other line may have; None: a random one.
            limits: the other arguments of :meth:`check`.

        Raises:
            BudgetError: if a limit would be exceeded, or ``uid`` is used; nothing is written then.
            LedgerBusyError: if another process keeps the file locked; nothing is written then.
        """
        while True:
            # Accounting takes seconds: outside of the transaction, other processes may write.
            seen = self.check(dataset, run, release, **limits)
            now, name = datetime.now(UTC), uid or secrets.token_hex(16)
            alone, seeded = limits.get("alone"), limits.get("seeded", False)
            order = (_stamp(now), dataset, run, round_, release, name)
            entry = LedgerEntry(*order, alone, limits.get("part", WHOLE), seeded)
            if self._append_after(seen, entry):
                return Reservation(release)

    def _append_after(self, seen: list[LedgerEntry], entry: LedgerEntry) -> bool:
        """Write an entry, unless its dataset has other entries than ``seen``.

        Returns:
            Whether it was written. If not, checks that were made with ``seen`` do not hold.
        """
        with self._exclusive() as db:
            unchanged = read_entries(db, entry.dataset) == seen
            if unchanged and db.execute(_NAMED, (entry.uid,)).fetchone():
                raise BudgetError("a release of this name is on the ledger: its keys are used")
            if unchanged:
                write_entry(db, entry)
        return unchanged


def _is_busy(error: sqlite3.Error) -> bool:
    """Tell whether another process's lock is the reason; extended codes add a high byte."""
    code = getattr(error, "sqlite_errorcode", 0)  # the sqlite3 module itself sets none
    return code & 0xFF == sqlite3.SQLITE_BUSY


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _check_alone_limit(
    past: list[Release], plan: Release, alone: float | None, limit: Limit
) -> None:
    opened = plan if alone is None else replace(plan, noise_multiplier=alone)
    check_limit(past, opened, limit, "node", "epsilon-alone")


def _check_run(entries: list[LedgerEntry], most: int | None) -> None:
    if most is not None and len(entries) >= most:
        raise BudgetError(f"{len(entries)} rounds of this run; max-rounds={most}")


def _check_day(entries: list[LedgerEntry], now: datetime, most: int | None) -> None:
    """Check the rounds of 24 hours; a line with a later time than now counts as one of them.

    So a clock that was set back only delays a client.
    """
    since = _stamp(now - timedelta(days=1))
    rounds = sum(entry.time > since for entry in entries)
    if most is not None and rounds >= most:
        raise BudgetError(f"{rounds} rounds in 24 hours; max-rounds-per-day={most}")


def state_folder(node_config: Mapping[str, object]) -> Path:
    """Return the folder of this client's ledger: ``state-path``, $LALORA_HOME or ~/.lalora."""
    default = os.environ.get("LALORA_HOME", "~/.lalora")
    return full_path(str(node_config.get("state-path", default)))
