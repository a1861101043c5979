"""Parse the run config: flat keys -> frozen dataclasses, after checks of every key and value."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast

from lalora_app.settings.cross_checks import check_together
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.method_numbers import MethodNumbers
from lalora_app.settings.names import AUTO, CLASS_MEANS, suggestion
from lalora_app.settings.sections import (
    BY_LABEL,
    PARTITIONERS,
    TASKS,
    Data,
    Lora,
    Model,
    Privacy,
    Train,
)
from lalora_app.settings.server_section import Server
from lalora_app.settings.value_rules import (
    count,
    law,
    non_empty,
    one_of,
    path,
    path_or_none,
    positive,
    switch,
)

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
OPEN: dict[str, Scalar] = {"data.labels": AUTO, "data.num-labels": 0}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The checked settings of one run."""

    method: str = non_empty(
        meaning="Federated LoRA method, one name of `lalora methods`; see [methods.md](methods.md)."
    )
    num_server_rounds: int = count(meaning="Number of rounds, failed ones included.")
    evaluate_every: int = count(
        meaning="Rounds between two evaluations on the test split; the last round is always "
        "evaluated."
    )
    fraction_train: float = law(
        "must be in (0, 1]",
        lambda v: 0 < v <= 1,
        meaning="Share of the clients that train in each round.",
    )
    min_clients: int = count(meaning="Number of SuperNodes to wait for before the first round.")
    min_replies: int = count(meaning="Valid replies that a round needs; with fewer it fails.")
    round_timeout: float = positive(meaning="Seconds to wait for the replies of one round.")
    node_timeout: float = positive(meaning="Seconds to wait for `min-clients` SuperNodes.")
    weighting: str = one_of(
        "uniform",
        "public-size",
        meaning="Weights of the clients in the mean: equal, or their number of examples where "
        "each client has declared it public.",
    )
    robust: str = one_of(
        "none",
        "median",
        "trimmed-mean",
        "krum",
        meaning="Robust aggregation in place of the mean, against clients that send wrong numbers.",
    )
    secure_aggregation: str = one_of(
        "none",
        "secagg+",
        meaning="Masks that cancel in the sum, so that the server sees sums of uploads only; "
        "see [secure-aggregation.md](secure-aggregation.md).",
    )
    suspects: int = law(
        "must not be negative",
        lambda v: v >= 0,
        meaning="Number of clients with wrong numbers that `trimmed-mean` or `krum` tolerates.",
    )
    seed: int = law(
        "must be from 0 to 9223372036854775807",
        lambda v: 0 <= v < 2**63,
        meaning="Seed of the partition, the initial adapter and the selection of clients. Noise "
        'and Poisson sampling depend on it only with `privacy.noise="seeded"`.',
    )
    central: bool = switch(
        meaning="In simulation, one client holds the whole training split and trains alone, with "
        "`train.batch-size` examples per step; the baseline of what the federation costs "
        "([comparisons](comparisons.md#baselines))."
    )
    output: str = path(meaning="Folder of all results; each run makes its own folder there.")
    resume_from: str = path_or_none(
        meaning="Folder of an interrupted run to continue; `none` starts a new run."
    )
    compare: str = path_or_none(
        meaning="Plan file that `lalora compare` writes: many runs inside one Flower run; `none` "
        "for a single run."
    )
    model: Model
    lora: Lora
    data: Data
    privacy: Privacy
    train: Train
    rule: MethodNumbers
    server: Server

    def is_last(self, attempt: int) -> bool:
        """Tell whether the run ends with this attempt (from 1)."""
        return attempt >= self.num_server_rounds

    @property
    def head_rounds(self) -> int:
        """Number of rounds of the head alone, before the method's first round."""
        return self.train.head_rounds + (self.model.head == CLASS_MEANS)

    def sums_classes(self, t: int) -> bool:
        """Tell whether clients release class sums in round ``t`` (from 1), and take no step."""
        return t == 1 and self.model.head == CLASS_MEANS

    def is_evaluated(self, attempt: int) -> bool:
        """Tell whether the test split is evaluated after this attempt (0: before the first)."""
        return attempt % self.evaluate_every == 0 or self.is_last(attempt)


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
