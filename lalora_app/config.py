"""The run config: flat keys -> frozen dataclasses. Every check of a value, every message."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

Scalar = str | int | float | bool
TASKS = ("text-classification", "image-classification", "causal-lm")
BY_LABEL = ("dirichlet", "pathological", "shard")  # partitioners that look at the labels
PARTITIONERS = (*BY_LABEL, "iid", "natural-id", "linear", "square", "exponential")
T = TypeVar("T")


class ConfigError(ValueError):
    """A value that the run cannot start with: names the key, the value and the law it breaks."""


def law(text: str, holds: Callable[[Any], bool]) -> Any:
    """Declare a dataclass field with the law that its value must obey (NaN obeys none)."""
    return field(metadata={"law": text, "holds": holds})


def _positive() -> Any:
    return law("must be finite and greater than 0", lambda v: 0 < v < math.inf)


def _count() -> Any:
    return law("must be at least 1", lambda v: v >= 1)


def _not_negative() -> Any:
    return law("must be finite and not negative", lambda v: 0 <= v < math.inf)


def _one_of(*allowed: str) -> Any:
    return law("must be one of " + ", ".join(f'"{a}"' for a in allowed), lambda v: v in allowed)


def _text() -> Any:
    return law("must not be empty", lambda v: bool(v.strip()))


def _columns() -> Any:
    return law(
        'must name one column, or two such as "question,sentence"',
        lambda v: len(names := v.split(",")) <= 2 and all(name.strip() for name in names),
    )


def _any() -> Any:
    return law("", lambda v: True)


def _path() -> Any:
    return law("must be an absolute path, or start with ~", lambda v: v.startswith(("/", "~")))


def _path_or_none() -> Any:
    return law(
        'must be "none" or an absolute path', lambda v: v == "none" or v.startswith(("/", "~"))
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen backbone."""

    name: str = _text()
    task: str = _one_of(*TASKS)
    weights: str = _one_of("pretrained", "random")
    pooling: str = _one_of("mean", "model")
    max_length: int = _count()
    image_size: int = _count()
    image_resize: int = _count()
    device: str = _one_of("auto", "cpu", "cuda")
    dtype: str = _one_of("auto", "float32", "bfloat16")
    attention: str = _one_of("auto", "sdpa", "eager")
    checkpointing: bool = _any()


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter: ΔW = (alpha / rank) · B·A on every target module."""

    rank: int = _count()
    alpha: float = _positive()
    targets: str = _text()
    kernel: str = _one_of("fused", "merged", "plain", "compiled")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The dataset, its public test split, and how it is dealt to simulated clients."""

    name: str = _text()
    subset: str = _text()
    train_split: str = _text()
    test_split: str = _text()
    input_column: str = _columns()
    label_column: str = _text()
    num_labels: int = law("must be at least 2", lambda v: v >= 2)
    test_fraction: float = law("must be in (0, 1)", lambda v: 0 < v < 1)
    partitioner: str = _one_of(*PARTITIONERS)
    dirichlet_alpha: float = law("must be greater than 0 (inf: IID)", lambda v: v > 0)
    classes_per_client: int = _count()
    shards_per_client: int = _count()
    client_column: str = _text()
    public_size: bool = _any()


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The promise to every client, over the whole run."""

    epsilon: float = law("must be greater than 0 (inf: not private)", lambda v: v > 0)
    delta: float = law("must be in (0, 1)", lambda v: 0 < v < 1)
    clip_norm: float = law("must be greater than 0", lambda v: v > 0)
    noise: str = _one_of("secure", "seeded")

    @property
    def private(self) -> bool:
        """Whether the run's guarantee is real: finite ε and noise that nobody can repeat."""
        return self.noise == "secure" and math.isfinite(self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Train:
    """One client's local steps."""

    local_steps: int = _count()
    batch_size: int = _count()
    micro_batch: int = _count()
    optimizer: str = _one_of("adamw", "sgd")
    lr_a: float = _positive()
    lr_b: float = _positive()
    lr_head: float = _positive()
    lr_decay: float = law("must be in (0, 1]", lambda v: 0 < v <= 1)
    momentum: float = law("must be in [0, 1)", lambda v: 0 <= v < 1)
    weight_decay: float = _not_negative()


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, as its run config says it."""

    method: str = _text()
    num_server_rounds: int = _count()
    fraction_train: float = law("must be in (0, 1]", lambda v: 0 < v <= 1)
    min_clients: int = _count()
    min_replies: int = _count()
    round_timeout: float = _positive()
    node_timeout: float = _positive()
    weighting: str = _one_of("uniform", "public-size")
    seed: int = law("must not be negative", lambda v: v >= 0)
    output: str = _path()
    resume_from: str = _path_or_none()
    compare: str = _path_or_none()
    model: Model
    lora: Lora
    data: Data
    privacy: Privacy
    train: Train


def _key(name: str, prefix: str) -> str:
    return prefix + name.replace("_", "-")


def _typed(key: str, value: object, wanted: type) -> Scalar:
    if wanted is float and type(value) is int:
        return float(value) if abs(value) < 2**1023 else math.copysign(math.inf, value)
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


def _check_together(config: Config) -> None:
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
        raise ConfigError(f'{key}={flat[key]!r} is no key of a run; did you mean "{nearest}"?')
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


def full_path(text: str) -> Path:
    """Return an absolute path for a config value that may start with ``~``."""
    return Path(text).expanduser()
