"""The content of one row: a text, a pair of texts or an image file; anything else is refused."""

import re
from pathlib import Path
from typing import Any

from lalora_app.data.sources import Columns
from lalora_app.settings.errors import DataError
from lalora_app.settings.run_config import Data

Content = str | tuple[str, ...] | bytes  # a text, a pair of texts, or an encoded image

_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)*|[.,]\d+)([eE][+-]?\d+)?%?")


def inputs_of(data: Data) -> list[str]:
    """Return the names of the input columns."""
    return [name.strip() for name in data.input_column.split(",")]


def _bad_input(data: Data, row: int, found: str) -> DataError:
    return DataError("data.input-column", f'="{data.input_column}": row {row} {found}')


def _is_image(value: object) -> bool:
    """Tell whether a value is an image as the `datasets` library keeps it."""
    if not isinstance(value, dict) or not {"bytes", "path"} >= value.keys() > set():
        return False
    return isinstance(value.get("bytes"), bytes | None)


def _image(value: dict[str, Any], data: Data, row: int) -> tuple[bytes, str]:
    """Return the bytes of an image file and its name."""
    path = value.get("path") or ""
    name = "/".join(Path(str(path)).parts[-2:])  # the folder is the class
    if value.get("bytes"):
        return value["bytes"], name
    try:
        if path and (content := Path(str(path)).read_bytes()):
            return content, name
    except (OSError, ValueError) as error:  # ValueError: of a name with a zero byte
        raise _bad_input(data, row, f"has no image: {path!r} cannot be read") from error
    raise _bad_input(data, row, f"has no image{f', {name} is empty' if name else ''}")


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"is a struct with {', '.join(map(str, value))}"
    if isinstance(value, bool):
        return f"holds the boolean {value}"
    if isinstance(value, int | float):
        return f"holds the number {value}"
    return f"is of type {type(value).__name__}"


def content_of(values: tuple[Any, ...], data: Data, row: int) -> tuple[Content, str]:
    """Return the content of a row and the name of its image file, "" for a text.

    Args:
        values: the row's values of the input columns.
        data: the run config's table ``data``.
        row: the position of the row, for errors.

    Raises:
        DataError: if all values are missing or blank, or one is neither text nor image.
    """
    if len(values) == 1 and _is_image(values[0]):
        return _image(values[0], data, row)
    for value in values:
        if value is not None and not isinstance(value, str):
            raise _bad_input(data, row, f"{_described(value)}, and must be a text or an image")
    texts = tuple(value or "" for value in values)
    if not any(text.strip() for text in texts):
        raise _bad_input(data, row, "has no text or image")
    return (texts[0] if len(texts) == 1 else texts), ""


def require_texts(columns: Columns, data: Data) -> None:
    """Refuse input columns with nothing but numbers in a file without types.

    Such a column is seldom meant: it holds identifiers or the labels.

    Raises:
        DataError: with the first number.
    """
    for name in inputs_of(data) if columns.untyped else ():
        texts = [value for value in columns[name] if value]
        if texts and all(_NUMBER.fullmatch(text.strip()) for text in texts):
            row = columns[name].index(texts[0])
            raise _bad_input(data, row, f"holds the number {texts[0]} and no text")
