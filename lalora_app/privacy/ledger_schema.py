"""The SQLite table of the ledger, and the upgrade of ledgers of older versions."""

import sqlite3
from contextlib import suppress

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
    uid TEXT
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


def create(db: sqlite3.Connection) -> None:
    """Make the table if it is missing, and give every line of an older ledger its uid."""
    db.executescript(SCHEMA)
    if "uid" not in {column[1] for column in db.execute("PRAGMA table_info(releases)")}:
        with suppress(sqlite3.OperationalError):  # another process has added the column already
            db.execute("ALTER TABLE releases ADD COLUMN uid TEXT")
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'release_names'").fetchone():
        db.executescript(_ADD_UIDS)
