"""Declare a config field: what it means, which values it takes, and the words of the error.

Every function returns a dataclass field. Its metadata holds ``meaning`` (one sentence with units,
shown in docs/configuration.md), ``law`` (the allowed values, as an error says them) and ``holds``
(the check of one value). NaN passes no check.
"""

import codecs
import json
import math
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

from lalora_app.settings.names import AUTO


def law(text: str, holds: Callable[[Any], bool], *, meaning: str) -> Any:
    """Declare a field whose values must obey ``text``, which starts with "must"."""
    return field(metadata={"law": text, "holds": holds, "meaning": meaning})


def positive(*, meaning: str) -> Any:
    """Declare a finite number above 0."""
    return law("must be finite and greater than 0", lambda v: 0 < v < math.inf, meaning=meaning)


def clip_norm(*, meaning: str) -> Any:
    """Declare a norm that float32 gradients can be clipped to, or inf.

    The lower limit is a matter of float32: squares of entries below 1e-18 become 0 and are missing
    in the norm. All such entries together are negligible beside 1e-6, but not beside a smaller
    norm.
    """
    return law(
        "must be from 1e-6 to 1e6, or inf",
        lambda v: 1e-6 <= v <= 1e6 or v == math.inf,
        meaning=meaning,
    )


def count(*, meaning: str) -> Any:
    """Declare an integer of at least 1."""
    return law("must be at least 1", lambda v: v >= 1, meaning=meaning)


def not_negative(*, meaning: str) -> Any:
    """Declare a finite number of at least 0."""
    return law("must be finite and not negative", lambda v: 0 <= v < math.inf, meaning=meaning)


def one_of(*allowed: str, meaning: str) -> Any:
    """Declare one word of a fixed list."""
    words = ", ".join(f'"{word}"' for word in allowed)
    return law(f"must be one of {words}", lambda v: v in allowed, meaning=meaning)


DEVICE_LAW = (
    'must be "auto", "cpu", "cuda" or "cuda:N" with the number N of a GPU: the gradient kernels '
    "and the noise generator are tested on no other device"
)


def is_device(value: object) -> bool:
    """Tell whether a value names a supported device."""
    pattern = r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?"
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def device(*, meaning: str) -> Any:
    """Declare a supported device."""
    return law(DEVICE_LAW, is_device, meaning=meaning)


def _is_encoding(value: str) -> bool:
    if value == AUTO:
        return True
    try:
        return bool(codecs.lookup(value)._is_text_encoding)
    except (LookupError, ValueError):
        return False


def encoding(*, meaning: str) -> Any:
    """Declare "auto", or the name of a text encoding."""
    return law(
        'must be "auto", or an encoding that Python knows, such as "utf-8" or "cp1252"',
        _is_encoding,
        meaning=meaning,
    )


def non_empty(*, meaning: str) -> Any:
    """Declare a text with at least one visible character."""
    return law("must not be empty", lambda v: bool(v.strip()), meaning=meaning)


def columns(*, meaning: str) -> Any:
    """Declare one column name, or two that are separated by a comma."""
    return law(
        'must name one column, or two such as "question,sentence"',
        lambda v: len(names := v.split(",")) <= 2 and all(name.strip() for name in names),
        meaning=meaning,
    )


_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0*")  # of a number that is written as a float


def class_name(text: str) -> str:
    """Return the name of a class as labels spell it: no outer spaces, and "1" for "1.0"."""
    stripped = text.strip()
    whole = _WHOLE.fullmatch(stripped)
    return whole[1] if whole else stripped


def class_names_in(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, or in a JSON list for names with commas.

    Every name is spelled as :func:`class_name` spells the labels of the data: else "1.0" would be
    the name of no row, and a row with 1.0 would be taken for the position 1.

    Raises:
        ValueError: if the text starts as a JSON list and is none, or holds something but texts.
    """
    if not text.lstrip().startswith("["):
        return tuple(map(class_name, text.split(",")))
    names = json.loads(text)
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a JSON list of class names must hold texts only")
    return tuple(map(class_name, names))


def are_classes(text: str) -> bool:
    """Tell whether a text is "auto", or names two classes or more, all of them different."""
    if text == AUTO:
        return True
    try:
        names = class_names_in(text)
    except ValueError:
        return False
    return len(names) >= 2 and all(names) and len(set(names)) == len(names)


CLASSES_LAW = (
    'must be "auto", or two or more different names such as "ham,spam" or \'["ham", "spam"]\''
)


VALUES_LAW = 'must be "auto", or two or more different values such as "books,films"'


def value_list(*, meaning: str) -> Any:
    """Declare "auto", or the values of a column, two or more."""
    return law(VALUES_LAW, are_classes, meaning=meaning)


def class_list(*, meaning: str) -> Any:
    """Declare "auto", or the names of two classes or more."""
    return law(
        CLASSES_LAW,
        are_classes,
        meaning=meaning,
    )


def are_ranks(text: str) -> bool:
    """Tell whether a text is ``none`` or a list of ranks."""
    return text == "none" or all(part.strip().isdigit() and int(part) for part in text.split(","))


LAST = re.compile(r"last:([1-9][0-9]*)")  # the last blocks of a model, such as "last:2"


def layers(*, meaning: str) -> Any:
    """Declare "all", or a number of last blocks."""
    return law(
        'must be "all", or "last:K" with a number K of blocks of at least 1, such as "last:2"',
        lambda v: v == "all" or LAST.fullmatch(v) is not None,
        meaning=meaning,
    )


def switch(*, meaning: str) -> Any:
    """Declare true or false, which the type alone checks."""
    return law("", lambda v: True, meaning=meaning)


def path(*, meaning: str) -> Any:
    """Declare an absolute path, or one below a home directory."""
    return law(
        "must be an absolute path, or a path that starts with ~",
        lambda v: v.startswith(("/", "~")),
        meaning=meaning,
    )


def path_or_none(*, meaning: str) -> Any:
    """Declare an absolute path, one below a home directory, or "none"."""
    return law(
        'must be "none", an absolute path, or a path that starts with ~',
        lambda v: v == "none" or v.startswith(("/", "~")),
        meaning=meaning,
    )
