"""The Markdown tables of a run of `benchmarks/gpu.py`, for docs/performance.md."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_parts.part_file import read
from gpu_parts.settings import Row

Rows = Sequence[Row]


def to_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    ruler = "|" + "---|" * len(head)
    return "\n".join([_line(head), ruler, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _ratio(row: Row | None) -> str:
    """Return median, least and largest ratio; – for a variant that was not measured."""
    if row is None or "error" in row:
        return "–" if row is None else "fails"
    return f"{row['wall_ratio']:.2f} [{row['wall_least']:.2f}-{row['wall_most']:.2f}]"


def _peak(row: Row | None) -> str:
    return _number((row or {}).get("peak_ratio"), ".3f")


def _cells(rows: Rows, kind: str) -> Iterable[tuple[list[str], dict[str, Row]]]:
    """Yield model, phase and batch of each cell, with its rows by variant."""

    def cell(row: Row) -> tuple[str, str, int]:
        return row["model"], row["phase"], row["batch"]

    for key, found in groupby((row for row in rows if row["kind"] == kind), cell):
        by_variant = {row["variant"]: row for row in found}
        milliseconds = _number(by_variant.get("peft", {}).get("wall_ms"), ".1f")
        yield [*map(str, key), milliseconds], by_variant


_CELL = ["model", "phase", "batch", "PEFT, ms"]


def _correctness(rows: Rows) -> str:
    sums = [row for row in rows if row["check"] == "clipped sum"]
    cases = sorted({(row["model"], row["dtype"]) for row in sums})
    lines = []
    for case in cases:
        own = [row for row in sums if (row["model"], row["dtype"]) == case]
        worst = [f"{max(row[key] for row in own):.1e}" for key in ("error", "stock_error")]
        lines.append([*case, *worst])
    counts = {ok: sum(row["ok"] is ok for row in rows) for ok in (True, False)}
    table = to_table(["model", "type", "largest error of a sum", "of stock PEFT"], lines)
    return f"{table}\n\n{counts[True]} checks are right, {counts[False]} are wrong."


def eager(rows: Rows) -> str:
    """Return the table of eager steps."""
    variants = ("fused", "merged", "opacus-hooks", "opacus-ghost")
    lines = (
        [*cell, *(_ratio(by.get(name)) for name in variants), _peak(by.get("fused"))]
        for cell, by in _cells(rows, "eager")
    )
    return to_table([*_CELL, *variants, "peak memory of fused"], lines)


def _compiled(rows: Rows) -> str:
    def line(cell: list[str], by: Mapping[str, Row]) -> list[str]:
        stock, own = by.get("peft-compiled"), by.get("compiled")
        quotient = _number((own or {}).get("wall_to_compiled_peft"), ".2f")
        return [*cell, _ratio(stock), _ratio(own), quotient, _peak(stock), _peak(own)]

    head = [*_CELL, "compiled PEFT", "compiled", "compiled / compiled PEFT"]
    head += ["peak memory of compiled PEFT", "of compiled"]
    return to_table(head, (line(*cell) for cell in _cells(rows, "compiled")))


def _graphs(rows: Rows) -> str:
    variants = ("fused", "peft-graph", "fused-graph")
    lines = (
        [*cell, *(_ratio(by.get(name)) for name in variants)]
        for cell, by in _cells(rows, "cuda graph")
    )
    return to_table([*_CELL, *variants], lines)


def _attention(rows: Rows) -> str:
    lines = (
        [
            row["model"],
            "on" if row["cudnn_attention"] else "off",
            row["batch_sizes"],
            f"{row['wall_ms']:.1f}",
            f"{row['cpu_ms']:.1f}",
        ]
        for row in rows
        if row["kind"] == "attention"
    )
    return to_table(["model", "cuDNN's attention", "batch sizes", "step, ms", "host, ms"], lines)


def _memory(rows: Rows) -> str:
    lines = (
        [
            row["model"],
            row["variant"],
            str(row["limit_mib"]),
            "fails" if "error" in row else str(row["largest_batch"]),
        ]
        for row in rows
    )
    return to_table(["model", "variant", "limit, MiB", "largest batch"], lines)


def _columns(*keys: str) -> Callable[[Rows], str]:
    """Return a function that makes a table of the values of these keys."""

    def table(rows: Rows) -> str:
        return to_table(keys, ([str(row[key]) for key in keys] for row in rows))

    return table


# title, part, and the function that makes the table of the part's rows
TABLES: tuple[tuple[str, str, Callable[[Rows], str]], ...] = (
    ("Correctness", "correctness", _correctness),
    ("Steps", "steps", eager),
    ("Compiled steps", "steps", _compiled),
    ("CUDA graphs", "steps", _graphs),
    ("cuDNN's attention", "steps", _attention),
    ("Largest batch", "memory", _memory),
    (
        "Rounds",
        "rounds",
        _columns(
            *("clients", "processes", "batch", "round_s", "training_share"),
            *("slowest_client_s", "examples_per_second"),
        ),
    ),
    ("Study", "study", _columns("method", "epsilon", "rounds", "accuracy", "seconds")),
)


def _gates(gates: Rows) -> str:
    words = {True: "met", False: "missed", None: "not measured"}
    lines = (
        [gate["gate"], gate["bound"], _number(gate["value"], ".3f"), words[gate["met"]]]
        for gate in gates
    )
    return to_table(["gate", "bound", "worst value", ""], lines)


def page(folder: Path) -> str:
    """Return all tables of a run: the machine, the parts' status, the gates, and the rows."""
    summary: dict[str, Any] = read(folder / "summary.json")
    about = ", ".join(f"{key} {value}" for key, value in summary["about"].items())
    parts = (
        [name, part["status"], part.get("reason", ""), f"{part['seconds']:.0f}"]
        for name, part in summary["parts"].items()
    )
    texts = [about, to_table(["part", "status", "reason", "seconds"], parts)]
    texts.append(_gates(summary["gates"]))
    for title, part, table in TABLES:
        rows = read(folder / f"{part}.json")["rows"]
        texts.append(f"### {title}\n\n{table(rows) if rows else 'No rows.'}")
    return "\n\n".join(texts)
