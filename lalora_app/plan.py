"""A comparison as data: which runs it is made of, and how each differs from the others."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lalora_app.config import Config, ConfigError, Scalar, from_tables, parse
from lalora_app.methods import method_of

Flat = dict[str, Scalar]
Line = tuple[str, float]  # label and ε
Scales = Mapping[Line, float]  # factors of the learning rates
RATES = ("train.lr-a", "train.lr-b", "train.lr-head")
_METHODS = ("dp-lora", "ffa-lora", "rolora", "la-lora", "la-lora-full")
_TUNE = {"grid", "seeds", "test-fraction"}
_CONTROL = {"method", "label", "epsilons", "config"}
_DEFAULTS: dict[str, Any] = {
    "name": "comparison",
    "nodes": 4,
    "methods": list(_METHODS),
    "epsilons": [1.0, 3.0, math.inf],
    "seeds": [0, 1, 2],
    "controls": [],
    "tune": None,
}


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a method with what is particular to it, at some budgets."""

    label: str
    epsilons: tuple[float, ...]
    config: Mapping[str, Scalar]


@dataclass(frozen=True)
class Tuning:
    """The grid that every line's learning rates are tuned on, with data that no test touches.

    Attributes:
        grid: factors that multiply all learning rates.
        seeds: of the tuning runs, and of nothing else.
        test_fraction: of the training data, on which the factors are judged.
    """

    grid: tuple[float, ...]
    seeds: tuple[int, ...]
    test_fraction: float


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        label: of its line.
        epsilon: promised.
        folder: where its run goes, below the comparison's own folder.
        config: all keys and values of the run.
        scale: of its learning rates.
    """

    label: str
    epsilon: float
    folder: str
    config: Flat
    scale: float = 1.0

    @property
    def line(self) -> Line:
        """What the run is one seed of."""
        return self.label, self.epsilon


@dataclass(frozen=True)
class Plan:
    """A whole comparison: entries × their ε × seeds, after a tuning of each entry at each ε."""

    name: str
    nodes: int
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None
    config: Mapping[str, Scalar]

    def _cell(self, entry: Entry, epsilon: float, folder: str, scale: float, **keys: Any) -> Cell:
        budget = {"privacy.epsilon": epsilon, "min-clients": self.nodes}
        own = {**self.config, **entry.config, **budget, **keys}
        rates = {key: float(own[key]) * scale for key in RATES}
        return Cell(entry.label, epsilon, folder, own | rates, scale)

    def _lines(self) -> Iterable[tuple[Entry, float]]:
        return ((entry, epsilon) for entry in self.entries for epsilon in entry.epsilons)

    def tuning_cells(self) -> list[Cell]:
        """Return the runs that learning rates are chosen by; none without a grid."""
        tuning = self.tuning
        if tuning is None:
            return []
        return [
            self._tuning_cell(tuning, entry, epsilon, scale, seed)
            for entry, epsilon in self._lines()
            for scale in tuning.grid
            for seed in tuning.seeds
        ]

    def _tuning_cell(
        self, tuning: Tuning, entry: Entry, epsilon: float, scale: float, seed: int
    ) -> Cell:
        folder = f"tuning/{_slug(entry.label)}-eps{epsilon:g}-x{scale:g}-seed{seed}"
        rounds = {**self.config, **entry.config}["num-server-rounds"]
        keys = {
            "seed": seed,
            "data.test-split": "none",  # the test set plays no part
            "data.test-fraction": tuning.test_fraction,
            "evaluate-every": rounds,  # nobody looks at the curve
        }
        return self._cell(entry, epsilon, folder, scale, **keys)

    def cells(self, scales: Scales) -> list[Cell]:
        """Return the runs that are compared, seed by seed: cut short, it is a smaller comparison.

        Args:
            scales: of each line; 1 where there is none.
        """
        return [
            self._cell(
                entry,
                e,
                f"{_slug(entry.label)}-eps{e:g}-seed{seed}",
                scales.get((entry.label, e), 1.0),
                seed=seed,
            )
            for seed in self.seeds
            for entry, e in self._lines()
        ]

    def best(self, results: Sequence[tuple[Cell, float]]) -> dict[Line, float]:
        """Return the scale of each line whose tuning runs are the most accurate on average.

        Args:
            results: tuning cells with their accuracy; of equals, the smaller scale wins.
        """
        scores: dict[tuple[Line, float], list[float]] = {}
        for cell, accuracy in results:
            scores.setdefault((cell.line, cell.scale), []).append(accuracy)
        ranked = sorted(scores, key=lambda choice: (fmean(scores[choice]), -choice[1]))
        return dict(ranked)


def _slug(label: str) -> str:
    """Return a label as a folder's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in label)


def _numbers(key: str, value: object, kind: type) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else []
    good = [v for v in values if type(v) in (int, kind)]
    if not values or len(good) < len(values) or len(set(good)) < len(good):
        raise ConfigError(f"compare.{key}={value!r} must be a list of different numbers")
    return tuple(kind(v) for v in values)


def _control(control: Mapping[str, Any], epsilons: tuple[float, ...]) -> Entry:
    if "method" not in control or control.keys() - _CONTROL:
        raise ConfigError(
            f"compare.controls={dict(control)!r} must have a method, and may have "
            + ", ".join(sorted(_CONTROL - {"method"}))
        )
    own = _numbers("controls.epsilons", control.get("epsilons", list(epsilons)), float)
    config = {"method": control["method"], **from_tables(control.get("config", {}))}
    return Entry(str(control.get("label", control["method"])), own, config)


def _entries(settings: Mapping[str, Any]) -> tuple[Entry, ...]:
    epsilons = _numbers("epsilons", settings["epsilons"], float)
    names = settings["methods"]
    if not isinstance(names, list):
        raise ConfigError(f"compare.methods={names!r} must be a list of methods")
    entries = [Entry(str(name), epsilons, {"method": name}) for name in names]
    entries += [_control(control, epsilons) for control in settings["controls"]]
    labels = [entry.label for entry in entries]
    if not labels or len(set(map(_slug, labels))) < len(labels):
        raise ConfigError(f"compare.methods={labels!r} must be different names, at least one")
    return tuple(entries)


def _tuning(raw: Mapping[str, Any] | None) -> Tuning | None:
    if raw is None:
        return None
    if wrong := _TUNE ^ raw.keys():
        raise ConfigError(f"compare.tune.{min(wrong)}: its keys must be {', '.join(sorted(_TUNE))}")
    grid = _numbers("tune.grid", raw["grid"], float)
    seeds = _numbers("tune.seeds", raw["seeds"], int)
    return Tuning(grid, seeds, float(raw["test-fraction"]))


def read_plan(tables: Mapping[str, Any], defaults: Mapping[str, Any]) -> Plan:
    """Return the plan of a comparison.

    Args:
        tables: keys of a run that all runs share, and the table ``compare``: ``name``, ``nodes``,
            ``methods``, ``epsilons``, ``seeds``, ``controls`` (each a ``method`` with ``label``,
            ``epsilons``, ``config``) and ``tune`` (``grid``, ``seeds``,
            ``test-fraction``). What is not given is the five methods of the paper at ε = 1, 3, inf
            with seeds 0, 1, 2.
        defaults: the app's own run config, flat.

    Raises:
        ConfigError: if any of its runs could not start.
    """
    own = dict(tables.get("compare", {}))
    if unknown := own.keys() - _DEFAULTS.keys():
        raise ConfigError(f"compare.{min(unknown)} must be one of {', '.join(_DEFAULTS)}")
    settings = _DEFAULTS | own
    if type(settings["nodes"]) is not int or settings["nodes"] < 1:
        raise ConfigError(f"compare.nodes={settings['nodes']!r} must be an integer of at least 1")
    shared = from_tables({key: value for key, value in tables.items() if key != "compare"})
    plan = Plan(
        name=_slug(str(settings["name"])),
        nodes=settings["nodes"],
        entries=_entries(settings),
        seeds=_numbers("seeds", settings["seeds"], int),
        tuning=_tuning(settings["tune"]),
        config={**defaults, **shared},
    )
    for cell in [*plan.tuning_cells(), *plan.cells({})]:
        parse_cell(cell)
    _check_tuning(plan)
    return plan


def _check_tuning(plan: Plan) -> None:
    splits = {str(cell.config["data.test-split"]) for cell in plan.cells({})}
    if plan.tuning and "none" in splits:
        raise ConfigError(
            'data.test-split="none" must name a split while there is a compare.tune: both would '
            "take the same examples from the training split (a single file and the demo have no "
            "other; a folder with two, such as train.jsonl and test.jsonl, has)"
        )


def parse_cell(cell: Cell) -> Config:
    """Return a run's config, checked.

    Raises:
        ConfigError: naming the run and what is wrong with it.
    """
    try:
        config = parse(cell.config)
        method_of(config)
    except ConfigError as error:
        raise ConfigError(f"{cell.folder}: {error}") from error
    return config


def to_json(tables: Mapping[str, Any]) -> str:
    """Return a plan's tables as JSON, which :func:`read_plan` takes again."""
    return json.dumps(tables, indent=2) + "\n"
