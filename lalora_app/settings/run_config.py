"""Parse the run config: flat keys -> frozen dataclasses, after checks of every key and value."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from lalora_app.settings.config import Config
from lalora_app.settings.cross_checks import check_together
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.method_numbers import MethodNumbers
from lalora_app.settings.names import AUTO, suggestion
from lalora_app.settings.sections import (
    BY_LABEL,
    PARTITIONERS,
    TASKS,
    Data,
    Lora,
    Model,
)
from lalora_app.settings.server_section import Server
from lalora_app.settings.training_sections import Privacy, Train

__all__ = [  # the sections of a run config are imported from here, beside Config
    "BY_LABEL",
    "OPEN",
    "PARTITIONERS",
    "TASKS",
    "Config",
    "Data",
    "Lora",
    "MethodNumbers",
    "Model",
    "Privacy",
    "Scalar",
    "Server",
    "Train",
    "as_float",
    "clients_per_round",
    "flatten",
    "from_tables",
    "parse",
]

Scalar = str | int | float | bool
# Values that a run replaces by what it finds in its data; its config.toml holds the latter.
OPEN: dict[str, Scalar] = {
    "data.labels": AUTO,
    "data.num-labels": 0,
    "data.task-values": AUTO,
    "train.union-size": 0,
}
T = TypeVar("T")


def _key(name: str, prefix: str) -> str:
    return prefix + name.replace("_", "-")


def as_float(value: float) -> float:
    """Return a number as a float; an integer above the largest float becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _typed(key: str, value: object, wanted: type) -> Scalar:
    if wanted is float and type(value) is int:
        return as_float(value)
    if type(value) is not wanted:
        kind = type(value).__name__
        raise ConfigError(f"{key}={value!r} must be of type {wanted.__name__}, not {kind}")
    return cast(Scalar, value)


def _checked(key: str, value: object, wanted: type, meta: Mapping[str, Any]) -> Scalar:
    typed = _typed(key, value, wanted)
    if not meta["holds"](typed):
        raise ConfigError(f"{key}={typed!r} {meta['law']}")
    return typed


def _build(kind: type[T], flat: dict[str, object], prefix: str = "") -> T:
    values: dict[str, Any] = {}
    for item in fields(cast(Any, kind)):
        wanted = cast(type, item.type)
        key = _key(item.name, prefix)
        if is_dataclass(wanted):
            values[item.name] = _build(wanted, flat, key + ".")
        elif key not in flat:
            raise ConfigError(f"{key} is missing: every key needs a value")
        else:
            values[item.name] = _checked(key, flat.pop(key), wanted, item.metadata)
    return kind(**values)


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        wanted = cast(type, item.type)
        key = _key(item.name, prefix)
        yield from _keys(wanted, key + ".") if is_dataclass(wanted) else (key,)


def clients_per_round(fraction: float, clients: int) -> int:
    """Return the size of a cohort: ``fraction`` of the clients, at least one."""
    return max(1, round(fraction * clients))


def parse(run_config: Mapping[str, object]) -> Config:
    """Turn Flower's flat run config into a checked :class:`Config`.

    Raises:
        ConfigError: for an unknown, missing, mistyped or out-of-range key.
    """
    flat = dict(run_config)
    config = _build(Config, flat)
    for key in flat:
        shown = key if key.isprintable() else repr(key)  # keeps the error on one line
        near = suggestion(key, _keys(Config))
        raise ConfigError(f"{shown}={flat[key]!r} is no key of a run{near}")
    check_together(config)
    return config


def flatten(config: object, prefix: str = "") -> dict[str, Scalar]:
    """Return the flat keys and values of a config: the inverse of :func:`parse`."""
    flat: dict[str, Scalar] = {}
    for item in fields(cast(Any, config)):
        key, value = _key(item.name, prefix), getattr(config, item.name)
        flat |= flatten(value, key + ".") if is_dataclass(value) else {key: value}
    return flat


def from_tables(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return TOML tables as flat dotted keys, the form in which Flower passes a run config."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        name = prefix + key
        flat |= from_tables(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
