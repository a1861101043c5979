"""Read finished runs from their folders, for tables, figures and reports."""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalora_app.results import strict_json
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Scalar, from_tables


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        label: name of the run's group in a comparison; runs of one label and ε differ by seed.
        method: name of the method.
        epsilon: limit of ε per client; inf: not private.
        seed: seed of all random numbers but secure noise and secure sampling.
        config: flat keys and values of the run config.
        summary: content of summary.json.
        history: rows of history.jsonl, one per attempt; never empty.
        partition: "labels" (names) and "clients" (counts per label, for each client); None: not
            known to the server.
        privacy: content of privacy.json.
        clients: number of clients; None: not recorded.
        audit: content of audit.json, written by ``lalora audit --run``; None: not audited.
    """

    label: str
    method: str
    epsilon: float
    seed: int
    config: dict[str, Scalar]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    partition: dict[str, Any] | None
    privacy: dict[str, Any]
    clients: int | None
    audit: dict[str, Any] | None = None

    @property
    def private(self) -> bool:
        """Whether the run has a guarantee; a run without a recorded kind of noise has none."""
        return self.config.get("privacy.noise") == "secure" and math.isfinite(self.epsilon)

    @property
    def failed(self) -> int:
        """Number of rounds that were not aggregated."""
        return sum(not row["aggregated"] for row in self.history)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(strict_json.loads(path.read_text("utf-8")))


def _read(folder: Path, label: str | None) -> Record:
    config = from_tables(tomllib.loads((folder / "config.toml").read_text("utf-8")))
    summary = _read_json(folder / "summary.json")
    if not (history := RunFolder(folder).history()):
        raise ValueError("history.jsonl is missing or empty")
    partition, audit = (
        _read_json(path) if path.is_file() else None
        for path in (folder / "partition.json", folder / "audit.json")
    )
    return Record(
        label=summary["method"] if label is None else label,
        method=summary["method"],
        epsilon=float(config["privacy.epsilon"]),
        seed=config["seed"],
        config=config,
        summary=summary,
        history=history,
        partition=partition,
        privacy=_read_json(folder / "privacy.json"),
        clients=len(partition["clients"]) if partition else RunFolder(folder).num_clients(),
        audit=audit,
    )


def read_record(folder: Path, label: str | None = None) -> Record:
    """Read a finished run.

    Args:
        folder: the run's folder.
        label: name of the run's group; None: the method's name.

    Raises:
        ConfigError: if the folder is not that of a finished run.
    """
    try:
        return _read(folder, label)
    except KeyError as error:
        raise ConfigError(f"{folder} must hold a finished run: {error} is missing") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} must hold a finished run: {error}") from error


def group(records: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """Return the runs by (label, ε): smallest ε first, labels in order of first appearance."""
    labels = list(dict.fromkeys(record.label for record in records))
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.epsilon, labels.index(r.label), r.seed)):
        groups.setdefault((record.label, record.epsilon), []).append(record)
    return groups
