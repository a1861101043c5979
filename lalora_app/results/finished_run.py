"""Finished runs, read back from their folders: what tables, figures and reports are made of."""

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
        label: what the run is called in a comparison; runs of one label and ε are its seeds.
        method: its entry of METHODS.
        epsilon: promised to every client; inf: not private.
        seed: of everything but the noise and the Poisson sampling.
        config: flat keys and values of the run config.
        summary: of summary.json.
        history: one row an attempt, of history.jsonl; never empty.
        partition: "labels" (names) and "clients" (a count per label, client by client); None
            where the server does not know it.
        privacy: of privacy.json.
        clients: how many took part; None where it is not recorded.
        audit: of audit.json, which ``lalora audit --run`` leaves; None: not audited.
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
        """Whether the guarantee is real; a run that does not say so is not private."""
        return self.config.get("privacy.noise") == "secure" and math.isfinite(self.epsilon)

    @property
    def failed(self) -> int:
        """How many rounds were not aggregated."""
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
        folder: that the run left.
        label: what to call it; None: by its method.

    Raises:
        ConfigError: if the folder holds no finished run.
    """
    try:
        return _read(folder, label)
    except KeyError as error:
        raise ConfigError(f"{folder} must hold a finished run: {error} is missing") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} must hold a finished run: {error}") from error


def group(records: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """Return the runs by (label, ε), smallest ε first, labels in the order they first appear."""
    labels = list(dict.fromkeys(record.label for record in records))
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.epsilon, labels.index(r.label), r.seed)):
        groups.setdefault((record.label, record.epsilon), []).append(record)
    return groups
