"""What an audit found, as text and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lalora_app.results.model_card import CARD_ROW

SURE = 1e-4  # p-value below which the verdict is "broken": one false alarm in 10,000 audits


@dataclass(frozen=True)
class AuditRow:
    """One attack's outcome.

    Attributes:
        name: of the part of the audit.
        epsilon: lower bound that assumes (ε, δ)-DP alone.
        curve: lower bound if the mechanism is the accountant's with an unknown noise; None: none.
        said: what the bound comes from.
        p_value: of so few errors under what the ledger has counted; None: not tested.
        roc: (false alarm rate, hit rate) by threshold; empty: one threshold alone.
    """

    name: str
    epsilon: float
    curve: float | None
    said: str
    p_value: float | None = None
    roc: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class AuditReport:
    """An audit of one seed.

    Attributes:
        mechanism: what was attacked.
        epsilon_upper: what the ledger counts, or what is claimed.
        confidence: of ``epsilon_lower``; the rows share it, so all of them hold together.
        delta: of both.
        seed: of the audit.
        rows: one a part of the audit.
        facts: more numbers, for the JSON.
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
        """The largest bound that assumes nothing but (ε, δ)-DP."""
        return max(row.epsilon for row in self.rows)

    @property
    def unlikely(self) -> bool:
        """Whether an attack errs less often than it would under what was counted."""
        return any(row.p_value is not None and row.p_value < SURE for row in self.rows)

    @property
    def broken(self) -> bool:
        """Whether more is proved than promised, or the mechanism is not what was counted."""
        return self.unlikely or self.epsilon_lower > self.epsilon_upper

    @property
    def verdict(self) -> str:
        """What follows, in a few words."""
        if self.epsilon_lower > self.epsilon_upper:
            return "BROKEN: more is proved than promised"
        return (
            "BROKEN: this is not the mechanism that was counted" if self.unlikely else "consistent"
        )

    def text(self) -> str:
        """Return the report as lines."""
        lines = [f"seed {self.seed}  {self.mechanism}, delta {self.delta:g}"]
        for row in self.rows:
            more = "" if row.curve is None else f", {row.curve:.2f} by the accountant's curve"
            more += "" if row.p_value is None else f", p-value {row.p_value:.2g}"
            lines.append(f"  {row.name}: at least {row.epsilon:.2f}{more}  ({row.said})")
        lines.append(
            f"  epsilon_upper {self.epsilon_upper:.3f}  epsilon_lower {self.epsilon_lower:.3f}  "
            f"confidence {self.confidence:g}  {self.verdict}"
        )
        return "\n".join(lines)

    def card_row(self) -> str:
        """Return the line of a model card that tells the lower bound."""
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
        return {**head, "parts": parts, **self.facts}

    def json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(self.fields())
