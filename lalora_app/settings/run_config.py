"""The run config: flat keys -> frozen dataclasses. Every check of a value, every message."""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.value_rules import (
    anything,
    are_ranks,
    clip_norm,
    columns,
    count,
    law,
    non_empty,
    not_negative,
    one_of,
    path,
    path_or_none,
    positive,
)

Scalar = str | int | float | bool
TASKS = ("text-classification", "image-classification", "causal-lm")
BY_LABEL = ("dirichlet", "pathological", "shard")  # partitioners that look at the labels
PARTITIONERS = (*BY_LABEL, "iid", "natural-id", "linear", "square", "exponential")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen backbone."""

    name: str = non_empty()
    task: str = one_of(*TASKS)
    weights: str = one_of("pretrained", "random")
    pooling: str = one_of("mean", "model")
    max_length: int = count()
    image_size: int = count()
    image_resize: int = count()
    device: str = one_of("auto", "cpu", "cuda")
    dtype: str = one_of("auto", "float32", "bfloat16")
    attention: str = one_of("auto", "sdpa", "eager")
    checkpointing: bool = anything()


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter: ΔW = (alpha / rank) · B·A on every target module."""

    rank: int = count()
    alpha: float = positive()
    targets: str = non_empty()
    ranks: str = law('must be "none" or ranks such as "4,8,16"', are_ranks)
    kernel: str = one_of("fused", "merged", "plain", "compiled")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The dataset, its public test split, and how it is dealt to simulated clients."""

    name: str = non_empty()
    subset: str = non_empty()
    train_split: str = non_empty()
    test_split: str = non_empty()
    input_column: str = columns()
    label_column: str = non_empty()
    num_labels: int = law("must be at least 2", lambda v: v >= 2)
    test_fraction: float = law("must be in (0, 1)", lambda v: 0 < v < 1)
    partitioner: str = one_of(*PARTITIONERS)
    dirichlet_alpha: float = law("must be greater than 0 (inf: IID)", lambda v: v > 0)
    classes_per_client: int = count()
    shards_per_client: int = count()
    client_column: str = non_empty()
    public_size: bool = anything()


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The promise to every client, over the whole run."""

    epsilon: float = law("must be greater than 0 (inf: not private)", lambda v: v > 0)
    delta: float = law("must be in (0, 1)", lambda v: 0 < v < 1)
    clip_norm: float = clip_norm()
    noise: str = one_of("secure", "seeded")

    @property
    def private(self) -> bool:
        """Whether the run's guarantee is real: finite ε and noise that nobody can repeat."""
        return self.noise == "secure" and math.isfinite(self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Train:
    """One client's local steps."""

    local_steps: int = count()
    batch_size: int = count()
    micro_batch: int = count()
    optimizer: str = one_of("adamw", "sgd")
    lr_a: float = positive()
    lr_b: float = positive()
    lr_head: float = positive()
    lr_decay: float = law("must be in (0, 1]", lambda v: 0 < v <= 1)
    momentum: float = law("must be in [0, 1)", lambda v: 0 <= v < 1)
    weight_decay: float = not_negative()


@dataclass(frozen=True, kw_only=True)
class MethodNumbers:
    """Numbers of single methods; the others leave them alone."""

    period: int = count()
    fair_weight: float = law("must not be negative (inf: no correction)", lambda v: v >= 0)
    flat_radius: float = not_negative()
    lr_ratio: float = positive()
    lr_gate: float = positive()
    gate_temperature: float = positive()
    tasks: int = count()
    sparsity: float = law("must be in [0, 1)", lambda v: 0 <= v < 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, as its run config says it."""

    method: str = non_empty()
    num_server_rounds: int = count()
    evaluate_every: int = count()
    fraction_train: float = law("must be in (0, 1]", lambda v: 0 < v <= 1)
    min_clients: int = count()
    min_replies: int = count()
    round_timeout: float = positive()
    node_timeout: float = positive()
    weighting: str = one_of("uniform", "public-size")
    robust: str = one_of("none", "median", "trimmed-mean", "krum")
    secure_aggregation: str = one_of("none", "secagg+")
    suspects: int = law("must not be negative", lambda v: v >= 0)
    seed: int = law("must not be negative", lambda v: v >= 0)
    output: str = path()
    resume_from: str = path_or_none()
    compare: str = path_or_none()
    model: Model
    lora: Lora
    data: Data
    privacy: Privacy
    train: Train
    rule: MethodNumbers

    def is_last(self, attempt: int) -> bool:
        """Tell whether the run ends with this attempt (from 1)."""
        return attempt >= self.num_server_rounds

    def is_evaluated(self, attempt: int) -> bool:
        """Tell whether the test split is looked at after this attempt (0: before the first)."""
        return attempt % self.evaluate_every == 0 or self.is_last(attempt)


def _key(name: str, prefix: str) -> str:
    return prefix + name.replace("_", "-")


def as_float(value: float) -> float:
    """Return a number as a float; an integer beyond all of them is infinite."""
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


def _check_model(config: Config) -> None:
    model, data = config.model, config.data
    if model.pooling == "mean" and model.task != "text-classification":
        raise ConfigError(f'model.pooling="mean" must be "model" for model.task="{model.task}"')
    if model.image_resize < model.image_size:
        raise ConfigError(
            f"model.image-resize={model.image_resize} must be at least model.image-size="
            f"{model.image_size}, which is cut out of its middle"
        )
    if data.label_column == "none" and model.task != "causal-lm":
        raise ConfigError(f'data.label-column="none" must name a column for "{model.task}"')
    if data.label_column == "none" and data.partitioner in BY_LABEL:
        raise ConfigError(
            f'data.partitioner="{data.partitioner}" must be one that needs no labels while '
            'data.label-column="none"'
        )


def _check_robust(config: Config) -> None:
    kind, suspects = config.robust, config.suspects
    fewest = {"none": 1, "krum": 2 * suspects + 3}.get(kind, 2 * suspects + 1)
    if config.min_replies < fewest:
        raise ConfigError(
            f"min-replies={config.min_replies} must be at least {fewest} for "
            f'robust="{kind}" with suspects={suspects}'
        )
    if suspects and kind in ("none", "median"):
        raise ConfigError(
            f'suspects={suspects} must be 0 for robust="{kind}", which has no use of it'
        )


def _check_together(config: Config) -> None:
    _check_robust(config)
    clip, epsilon = config.privacy.clip_norm, config.privacy.epsilon
    if math.isinf(clip) and math.isfinite(epsilon):
        raise ConfigError(f"privacy.clip-norm=inf must be finite while privacy.epsilon={epsilon}")
    _check_model(config)
    if config.train.momentum > 0 and config.train.optimizer != "sgd":
        raise ConfigError(
            f"train.momentum={config.train.momentum} must be 0 for optimizer "
            f'"{config.train.optimizer}"'
        )


def parse(run_config: Mapping[str, object]) -> Config:
    """Turn Flower's flat run config into a checked :class:`Config`.

    Raises:
        ConfigError: for an unknown, missing, mistyped or out-of-range key.
    """
    flat = dict(run_config)
    config = _build(Config, flat)
    for key in flat:
        nearest = difflib.get_close_matches(key, list(_keys(Config)), n=1, cutoff=0.0)[0]
        shown = key if key.isprintable() else repr(key)  # an error is one line
        raise ConfigError(f'{shown}={flat[key]!r} is no key of a run; did you mean "{nearest}"?')
    _check_together(config)
    return config


def flatten(config: object, prefix: str = "") -> dict[str, Scalar]:
    """Return the flat keys and values of a config: the inverse of :func:`parse`."""
    flat: dict[str, Scalar] = {}
    for item in fields(cast(Any, config)):
        key, value = _key(item.name, prefix), getattr(config, item.name)
        flat |= flatten(value, key + ".") if is_dataclass(value) else {key: value}
    return flat


def from_tables(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return TOML tables as flat dotted keys, as Flower hands them over."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        name = prefix + key
        flat |= from_tables(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
