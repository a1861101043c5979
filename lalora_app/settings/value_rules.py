"""Laws that the values of a config obey, and the error that names a broken one."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any


def law(text: str, holds: Callable[[Any], bool]) -> Any:
    """Declare a dataclass field with the law that its value must obey (NaN obeys none)."""
    return field(metadata={"law": text, "holds": holds})


def positive() -> Any:
    """Demand a finite number above 0."""
    return law("must be finite and greater than 0", lambda v: 0 < v < math.inf)


def clip_norm() -> Any:
    """Demand a norm that float32 gradients can be held to, or inf.

    Entries whose squares vanish in float32 are below 1e-18: all of them together are nothing
    beside 1e-6, and everything beside a smaller norm.
    """
    return law("must be from 1e-6 to 1e6, or inf", lambda v: 1e-6 <= v <= 1e6 or v == math.inf)


def count() -> Any:
    """Demand an integer of at least 1."""
    return law("must be at least 1", lambda v: v >= 1)


def not_negative() -> Any:
    """Demand a finite number of at least 0."""
    return law("must be finite and not negative", lambda v: 0 <= v < math.inf)


def one_of(*allowed: str) -> Any:
    """Demand one of a few words."""
    return law("must be one of " + ", ".join(f'"{a}"' for a in allowed), lambda v: v in allowed)


def non_empty() -> Any:
    """Demand a text."""
    return law("must not be empty", lambda v: bool(v.strip()))


def columns() -> Any:
    """Demand one or two names of columns."""
    return law(
        'must name one column, or two such as "question,sentence"',
        lambda v: len(names := v.split(",")) <= 2 and all(name.strip() for name in names),
    )


def are_ranks(text: str) -> bool:
    """Tell whether a text is ``none`` or a list of ranks."""
    return text == "none" or all(part.strip().isdigit() and int(part) for part in text.split(","))


def anything() -> Any:
    """Demand nothing but the type."""
    return law("", lambda v: True)


def path() -> Any:
    """Demand a full path."""
    return law("must be an absolute path, or start with ~", lambda v: v.startswith(("/", "~")))


def path_or_none() -> Any:
    """Demand a full path, or "none"."""
    return law(
        'must be "none" or an absolute path', lambda v: v == "none" or v.startswith(("/", "~"))
    )
