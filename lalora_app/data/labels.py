"""Labels as texts, and the position of each class among the model's outputs.

A label is a text, a boolean or a whole number. Equal names and equal whole numbers have equal texts
in every kind of file, and different ones never do, so all clients number the classes alike. A
boolean of a typed file is "True" or "False"; a file without types keeps its spelling, such as
"true".
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lalora_app.settings.errors import DataError
from lalora_app.settings.value_rules import class_name

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SHOWN = 12  # names in an error


def text_of(value: object) -> str:
    """Return the text of a label; an empty text: there is no label.

    A boolean gives "True" or "False", a whole number its digits ("1" for 1, 1.0 and "1.0"), a text
    itself without surrounding spaces.

    Raises:
        ValueError: for a value that names no class, with a description of it.
    """
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"the number {value}, which is not whole")
        return str(int(value))
    if isinstance(value, (bool, int)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__}")
    return class_name(value)


def class_of(position: int | None, classes: Sequence[str]) -> str | None:
    """Return the class name at a position; None for a missing label (None or -1).

    Raises:
        ValueError: for a position without a name, described as a label.
    """
    if position is None or position < 0:
        return None
    if position >= len(classes):
        raise ValueError(
            f"the class position {position}, and the file names {len(classes)} classes,"
        )
    return classes[position]


def name_of(value: Any, classes: Sequence[str], key: str, where: str, kind: str) -> str:
    """Return a value as text; with ``classes`` it is a position in them.

    Raises:
        DataError: naming the key and where the value is, for one that is no name.
    """
    try:
        return text_of(class_of(value, classes) if classes else value)
    except ValueError as error:
        law = "must be a name, a boolean or a whole number"
        raise DataError(key, f"{where}{error} as its {kind}, and {law}") from error


def is_integer(text: str) -> bool:
    """Tell whether a label's text is an integer."""
    return _INTEGER.fullmatch(text) is not None


def listed(names: Iterable[str]) -> str:
    """Return class names as a value of ``data.labels``."""
    names = list(names)
    plain = not any("," in name or name.startswith("[") for name in names)
    return ",".join(names) if plain else json.dumps(names, ensure_ascii=False)


def shown(names: Sequence[str]) -> str:
    """Return class names for an error; of many names the first ones."""
    few = ", ".join(map(repr, names[:_SHOWN]))
    return few if len(names) <= _SHOWN else f"{few} and {len(names) - _SHOWN} more"


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the different labels: integers by size, anything else by letters."""
    found = set(labels)
    if all(map(is_integer, found)):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def require_classes(labels: Sequence[str], column: str) -> None:
    """Refuse labels that are all numbers, some of them not written as integers.

    They are measured values, or one number may have several spellings, such as 1 and 01.

    Args:
        labels: the text of each row's label.
        column: the name of their column.

    Raises:
        DataError: naming the first row with a number that is not written as an integer.
    """
    if all(map(_NUMBER.fullmatch, labels)) and not all(map(is_integer, labels)):
        row = next(row for row, label in enumerate(labels) if not is_integer(label))
        raise DataError(
            "data.label-column",
            f'="{column}": row {row} has label {labels[row]}, and labels that are all numbers must '
            "be written as integers such as 1 or -1; if they are names of classes, list them in "
            "data.labels",
        )


def places(
    rows: Sequence[str], known: Mapping[str, int], names: Sequence[str], key: str, kind: str
) -> tuple[int, ...]:
    """Return the position of each row's name.

    Args:
        rows: the name in each row.
        known: the position of each name, in every spelling.
        names: the names, for an error.
        key: the config key that lists the names.
        kind: the kind of name in an error, such as "label".

    Raises:
        DataError: naming the first row whose name is unknown.
    """
    for row, name in enumerate(rows):
        if name not in known:
            wanted = f"must be one of {shown(names)}"
            raise DataError(key, f": row {row} has {kind} {name!r}, which {wanted}")
    return tuple(known[name] for name in rows)


def positions(labels: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Return the position of each row's label among the class names.

    If no name is an integer, integers from 0 are positions: ``data.labels="ham,spam"`` names the
    classes of data that holds 0 and 1.

    Raises:
        DataError: naming the first row whose label is none of the names.
    """
    known = {name: index for index, name in enumerate(names)}
    digits = {} if any(map(is_integer, names)) else {str(i): i for i in range(len(names))}
    return places(labels, known | digits, names, "data.labels", "label")
