"""A table of cells as plain text, Markdown and LaTeX."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple


class TableCell(NamedTuple):
    """The text of one cell, and whether it is the best mean at its ε."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """The titles of the columns, and the rows; the second column is ε."""

    titles: list[str]
    cells: list[list[TableCell]]


def as_text(table: Table) -> str:
    """Return the table as plain text with aligned columns."""
    lines = [table.titles, *([cell.text for cell in line] for line in table.cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = widths
    return "".join(
        "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], rest)]).rstrip() + "\n"
        for line in lines
    )


def as_markdown(table: Table) -> str:
    """Return the table as Markdown; the best cells are bold."""

    def show(cell: TableCell) -> str:
        text = re.sub(r"([\\`*_|<\[\]])", r"\\\1", cell.text)
        return f"**{text}**" if cell.best else text

    rule = ["---", *["---:"] * (len(table.titles) - 1)]
    lines = [table.titles, rule, *([show(cell) for cell in line] for line in table.cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# After the line end "\\", LaTeX would read "[" and "*" as arguments.
_LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {char: f"{{{char}}}" for char in "[]*"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--"}
    | {"±": r"$\pm$", "ε": r"$\varepsilon$", "∞": r"$\infty$"}
)


def as_latex(table: Table) -> str:
    """Return a LaTeX tabular for the package booktabs; the best cells are bold."""

    def show(cell: TableCell) -> str:
        text = cell.text.translate(_LATEX)
        return rf"\textbf{{{text}}}" if cell.best else text

    def line(texts: Sequence[str]) -> str:
        return " & ".join(texts) + r" \\" + "\n"

    # A rule separates the lines of different ε.
    blocks = groupby(table.cells, key=lambda cells: cells[1].text)
    body = ["".join(line([show(cell) for cell in row]) for row in block) for _, block in blocks]
    head = line([title.translate(_LATEX) for title in table.titles])
    return (
        f"\\begin{{tabular}}{{l{'r' * (len(table.titles) - 1)}}}\n\\toprule\n{head}\\midrule\n"
        + "\\midrule\n".join(body)
        + "\\bottomrule\n\\end{tabular}\n"
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def joined(values: Iterable[object]) -> str:
    """Return the distinct values, in order of appearance, joined by commas."""
    return ", ".join(dict.fromkeys(map(_text, values)))
