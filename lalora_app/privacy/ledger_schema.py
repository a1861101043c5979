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
    uid TEXT,
    alone_multiplier REAL
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


# Columns that older ledgers lack. In their lines all noise was the client's own: alone_multiplier
# is then NULL, as it is in new lines without shared noise.
_ADDED = {"uid": "TEXT", "alone_multiplier": "REAL"}


def create(db: sqlite3.Connection) -> None:
    """Make the table if it is missing, and give an older ledger its columns and uids."""
    db.executescript(SCHEMA)
    known = {column[1] for column in db.execute("PRAGMA table_info(releases)")}
    for name in sorted(_ADDED.keys() - known):
        with suppress(sqlite3.OperationalError):  # another process has added the column already
            db.execute(f"ALTER TABLE releases ADD COLUMN {name} {_ADDED[name]}")
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'release_names'").fetchone():
        db.executescript(_ADD_UIDS)
