"""The required values of the measurements, each with its bound and whether it is met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_parts.settings import Row


@dataclass(frozen=True)
class Gate:
    """A bound on one value of some rows of a part.

    Attributes:
        name: what is bounded.
        part: the part.
        rows: the values that a row must have to count.
        value: the key of the bounded value.
        bound: the bound.
        at_most: whether it is an upper bound.
    """

    name: str
    part: str
    rows: Mapping[str, Any]
    value: str
    bound: float
    at_most: bool = True

    def _counts(self, row: Row) -> bool:
        return self.rows.items() <= row.items() and row.get(self.value) is not None

    def _keeps(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def outcome(self, rows: Sequence[Row]) -> Row:
        """Return the worst value of all rows that count, and whether it keeps the bound.

        Limit: without such a row both are None.
        """
        own = [row for row in rows if self._counts(row)]
        worst_of, sign = (max, "<=") if self.at_most else (min, ">=")
        worst = worst_of(own, key=lambda row: row[self.value], default={})
        value = worst.get(self.value)
        return {
            "gate": self.name,
            "value": value,
            "bound": f"{sign} {self.bound:g}",
            "met": None if value is None else self._keeps(value),
            "worst": {k: worst[k] for k in ("model", "phase", "batch", "clients") if k in worst},
            "rows": len(own),
        }


_FUSED, _COMPILED = {"variant": "fused"}, {"variant": "compiled"}
GATES = (
    Gate("time of fused / stock PEFT", "steps", _FUSED, "wall_ratio", 1.05),
    Gate("time of compiled / compiled PEFT", "steps", _COMPILED, "wall_to_compiled_peft", 1.03),
    Gate("peak memory of fused / stock PEFT", "steps", _FUSED, "peak_ratio", 1.05),
    Gate("peak memory of compiled / stock PEFT", "steps", _COMPILED, "peak_ratio", 1.05),
    Gate(
        "share of training in a round of 8 clients",
        "rounds",
        {"clients": 8},
        "training_share",
        0.9,
        at_most=False,
    ),
)


def outcomes(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return the outcome of every gate.

    Args:
        rows: part -> its rows.
    """
    return [gate.outcome(rows.get(gate.part, [])) for gate in GATES]
