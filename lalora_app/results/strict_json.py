"""JSON files that every parser can read, also with numbers that are not finite.

JSON has no infinity and no NaN. They are written as the texts "inf", "-inf" and "nan". A text that
would be mistaken for one of them is written with one more "~" in front, so that every value is read
back as it was.
"""

import json
import math
import re
from typing import Any

_NOT_FINITE = re.compile(r"inf|-inf|nan")
_ESCAPED = re.compile(r"~+(inf|-inf|nan)")


def _encoded(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return str(float(value))
        case str() if _NOT_FINITE.fullmatch(value) or _ESCAPED.fullmatch(value):
            return f"~{value}"
        case dict():
            return {key: _encoded(item) for key, item in value.items()}
        case list() | tuple():
            return [_encoded(item) for item in value]
    return value


def _decoded(value: Any) -> Any:
    match value:
        case str() if _NOT_FINITE.fullmatch(value):
            return float(value)
        case str() if _ESCAPED.fullmatch(value):
            return value[1:]
        case dict():
            return {key: _decoded(item) for key, item in value.items()}
        case list():
            return [_decoded(item) for item in value]
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return a value as strict JSON, in ASCII: a text cannot break a line or the encoding.

    Args:
        value: nested dicts with text keys, lists, texts, numbers, booleans and None; tuples are
            written as lists.
        indent: spaces per level; None: one line.
    """
    return json.dumps(_encoded(value), allow_nan=False, indent=indent)


def loads(text: str) -> Any:
    """Return the value that :func:`dumps` wrote; also read plain JSON of other programs.

    Raises:
        ValueError: if the text is not JSON.
    """
    return _decoded(json.loads(text))
