"""Ledgers as older versions of the app wrote them."""

import sqlite3
from pathlib import Path

from lalora_app.privacy.ledger_entries import SCHEMA


def write_older(path: Path, *without: str) -> None:
    """Make a ledger without these columns, given as "name TYPE", and with one line.

    The line has the sampling rate 0.1, the noise multiplier 1.5 and four releases.
    """
    schema = SCHEMA
    for column in without:
        assert f",\n    {column}" in schema
        schema = schema.replace(f",\n    {column}", "")
    with sqlite3.connect(path) as db:
        db.executescript(schema)
        db.execute(
            "INSERT INTO releases (time, dataset, run, round, sampling_rate, noise_multiplier, "
            "count, uid) VALUES ('', 'data', 'old', 1, 0.1, 1.5, 4, 'x')"
        )
