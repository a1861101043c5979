"""Types of command-line arguments: each turns a text into a checked value."""

import argparse
from collections.abc import Callable
from typing import Any


def to_delta(text: str) -> float:
    """Read a number in (0, 1) from the command line."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be in (0, 1)")
    return value


def to_limit(text: str) -> float:
    """Read a number greater than 0 from the command line."""
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def at_least_one(text: str) -> int:
    """Read an integer of at least 1 from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return the type of a comma-separated list of values of one type."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse
