"""Types of command-line arguments: each turns a text into a checked value.

Each error names the value and its law; argparse adds the option.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T", int, float)


def _number(text: str, kind: Callable[[str], T], law: str, holds: Callable[[T], bool]) -> T:
    """Return the number in a text that must obey a law.

    Raises:
        argparse.ArgumentTypeError: if the text is no number of this kind, or breaks the law.
    """
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be {law}")
    return value


def one_of(*names: str) -> Callable[[str], str]:
    """Return a type that takes one of these names."""

    def named(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(names)}")
        return text

    return named


def add_run_config(command: argparse.ArgumentParser) -> None:
    """Add the option ``-c``, a part of the run config."""
    command.add_argument(
        "-c",
        "--run-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="value of a key of the run config; may be repeated",
    )


def to_delta(text: str) -> float:
    """Return a number in (0, 1)."""
    return _number(text, float, "a number in (0, 1)", lambda value: 0 < value < 1)


def to_limit(text: str) -> float:
    """Return a number greater than 0; inf is allowed."""
    return _number(text, float, "a number greater than 0", lambda value: value > 0)


def to_positive(text: str) -> float:
    """Return a finite number greater than 0."""
    return _number(text, float, "a finite number greater than 0", lambda v: 0 < v < math.inf)


def at_least_one(text: str) -> int:
    """Return an integer of at least 1."""
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def to_seed(text: str) -> int:
    """Return an integer of at least 0."""
    return _number(text, int, "an integer of at least 0", lambda value: value >= 0)


def to_seeds(text: str) -> Sequence[int]:
    """Return the seeds in ``0,1,2``, or in ``0..19`` with both ends included."""
    first, dots, last = text.partition("..")
    if not dots:
        return list_of(to_seed)(text)
    seeds = range(to_seed(first), to_seed(last) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} must be a range with the smaller seed first")
    return seeds


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return the type of a comma-separated list of values of one type."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse
