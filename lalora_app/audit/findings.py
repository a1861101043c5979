"""The report of an audit: as text, as JSON, as a line of a model card, and in a run's folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalora_app.results.finished_run import read_record
from lalora_app.results.model_card import CARD_ROW
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError

SURE = 1e-4  # p-value below which the verdict is "broken": one false alarm in 10,000 parts


@dataclass(frozen=True)
class AuditRow:
    """The outcome of one attack.

    Attributes:
        name: name of this part of the audit.
        epsilon: lower bound that assumes (ε, δ)-DP alone.
        curve: lower bound if the mechanism is the counted one with an unknown noise; None: not
            computed.
        evidence: the guesses or errors behind the bound, in a few words.
        p_value: chance of so few errors under the counted mechanism; None: not tested.
        roc: (false alarm rate, hit rate) by threshold; empty for an attack with one threshold.
        promise: ε to test, where it is another one than that of the report; None: the report's.
    """

    name: str
    epsilon: float
    curve: float | None
    evidence: str
    p_value: float | None = None
    roc: Sequence[tuple[float, float]] = ()
    promise: float | None = None


@dataclass(frozen=True)
class AuditReport:
    """The outcome of an audit with one seed.

    Attributes:
        mechanism: name of the attacked mechanism.
        epsilon_upper: ε by the ledger, or the claimed ε of a published mechanism.
        confidence: confidence of ``epsilon_lower``; the bounds of all rows hold together.
        delta: δ of both bounds.
        seed: seed of the audit.
        rows: one outcome per part of the audit.
        facts: further numbers for the JSON.
    """

    mechanism: str
    epsilon_upper: float
    confidence: float
    delta: float
    seed: int
    rows: Sequence[AuditRow]
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def epsilon_lower(self) -> float:
        """The largest lower bound on the report's ε that assumes nothing but (ε, δ)-DP."""
        return max(row.epsilon for row in self.rows if row.promise is None)

    @property
    def above_promise(self) -> bool:
        """Whether a lower bound is above its promise."""
        promises = [self.epsilon_upper if r.promise is None else r.promise for r in self.rows]
        return any(row.epsilon > most for row, most in zip(self.rows, promises, strict=True))

    @property
    def rejects_counted(self) -> bool:
        """Whether an attack makes too few errors for the counted mechanism."""
        return any(row.p_value is not None and row.p_value < SURE for row in self.rows)

    @property
    def broken(self) -> bool:
        """Whether the bound is above the promise, or the mechanism is not the counted one."""
        return self.rejects_counted or self.above_promise

    @property
    def verdict(self) -> str:
        """The verdict in a few words."""
        if self.above_promise:
            return "BROKEN: more is proved than promised"
        if self.rejects_counted:
            return "BROKEN: this is not the mechanism that was counted"
        return "consistent"

    def text(self) -> str:
        """Return the report as lines."""
        lines = [f"seed {self.seed}  {self.mechanism}, delta {self.delta:g}"]
        for row in self.rows:
            more = "" if row.curve is None else f", {row.curve:.2f} by the accountant's curve"
            more += "" if row.p_value is None else f", p-value {row.p_value:.2g}"
            more += "" if row.promise is None else f", promise {row.promise:.3f}"
            lines.append(f"  {row.name}: at least {row.epsilon:.2f}{more}  ({row.evidence})")
        lines.append(
            f"  epsilon_upper {self.epsilon_upper:.3f}  epsilon_lower {self.epsilon_lower:.3f}  "
            f"confidence {self.confidence:g}  {self.verdict}"
        )
        return "\n".join(lines)

    def card_row(self) -> str:
        """Return the line of a model card with the lower bound."""
        verdict = f"; **{self.verdict}**" if self.broken else ""
        return (
            f"{CARD_ROW} {self.epsilon_lower:.2f} at {self.confidence:.0%} confidence "
            f"(`lalora audit`, seed {self.seed}; ledger {self.epsilon_upper:.2f}){verdict} |"
        )

    def fields(self) -> dict[str, Any]:
        """Return the report as plain values."""
        head = {
            "epsilon_upper": self.epsilon_upper,
            "epsilon_lower": self.epsilon_lower,
            "confidence": self.confidence,
            "mechanism": self.mechanism,
            "delta": self.delta,
            "seed": self.seed,
            "broken": self.broken,
        }
        keys = ("epsilon", "curve", "p_value", "roc")
        parts = {row.name: {key: getattr(row, key) for key in keys} for row in self.rows}
        for row in self.rows:
            if row.promise is not None:
                parts[row.name]["promise"] = row.promise
        return {**head, "parts": parts, **self.facts}

    def json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(self.fields())


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run, before any attack.

    Raises:
        ConfigError: if it does not.
    """
    read_record(folder)
    if not _card(folder).is_file():
        raise ConfigError(f"run={folder} must have a model card, {_card(folder)}")


def _card(folder: Path) -> Path:
    return RunFolder(folder).adapter / "README.md"


def add_to_run(found: AuditReport, folder: Path) -> None:
    """Write audit.json, and both ε into the run's report and model card.

    Args:
        found: the audit of the run's own config.
        folder: the folder of a finished run; an earlier audit in it is replaced.
    """
    from lalora_app.reports.page import write_report

    RunFolder(folder).write_json("audit.json", found.fields())
    write_report([read_record(folder)], folder / "report.html", folder.resolve().name)
    lines = _card(folder).read_text("utf-8").splitlines()
    updated = [found.card_row() if line.startswith(CARD_ROW) else line for line in lines]
    _card(folder).write_text("\n".join(updated) + "\n", "utf-8")
