"""Read and check the tables of a plan file."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lalora_app.comparison.baselines import BASELINES, with_baselines
from lalora_app.comparison.plan import Plan, PlanEntry, Tuning, parse_cell, slug
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import as_float, from_tables

_METHODS = ("dp-lora", "ffa-lora", "rolora", "la-lora", "la-lora-full")
_TUNE = {"grid", "seeds", "test-fraction"}
# Keys of a run that the plan sets through keys of its own; set directly, they are refused.
_AXES = {
    "method": "compare.methods",
    "seed": "compare.seeds",
    "privacy.epsilon": "compare.epsilons",
}
_OF_ALL = {"min-clients": "compare.nodes", "output": "the plan's output", "compare": "the plan"}
_CONTROL = {"method", "label", "epsilons", "config"}
_DEFAULTS: dict[str, Any] = {
    "name": "comparison",
    "nodes": 4,
    "methods": list(_METHODS),
    "epsilons": [1.0, 3.0, math.inf],
    "seeds": [0, 1, 2],
    "controls": [],
    "tune": None,
    "baselines": False,
    "reference": None,
}


def _numbers(key: str, value: object, kind: type) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else []
    good = [v for v in values if type(v) in (int, kind)]
    if not values or len(good) < len(values) or len(set(good)) < len(good):
        raise ConfigError(f"compare.{key}={value!r} must be a list of different numbers")
    return tuple(as_float(v) if kind is float else v for v in values)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"compare.{key}={value!r} must be a text")
    return value


def table_of(key: str, value: object) -> dict[str, Any]:
    """Return the value as a dict.

    Raises:
        ConfigError: if the value is no table.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} must be a table")
    return dict(value)


def _require_free(place: str, keys: Mapping[str, Any], taken: Mapping[str, str]) -> None:
    for key in taken.keys() & keys.keys():
        raise ConfigError(f"{place}{key}={keys[key]!r} must be left out: {taken[key]} sets it")


def check_file(tables: Mapping[str, Any]) -> None:
    """Refuse keys of a run that the ``compare`` table of the same file sets.

    A preset of a run has no such table and passes.

    Raises:
        ConfigError: naming the first such key.
    """
    if "compare" in tables:
        _require_free("", from_tables(tables), _AXES)


def controls_of(value: object) -> list[dict[str, Any]]:
    """Return the tables of ``compare.controls``, each with flat keys in its ``config``.

    Raises:
        ConfigError: if a table has no method, or has unknown keys.
    """
    if not isinstance(value, list):
        raise ConfigError(f"compare.controls={value!r} must be tables, each a [[compare.controls]]")
    return [_flat_control(table_of("compare.controls", control)) for control in value]


def _flat_control(control: dict[str, Any]) -> dict[str, Any]:
    if "method" not in control or control.keys() - _CONTROL:
        raise ConfigError(
            f"compare.controls={control!r} must have a method, and may have "
            + ", ".join(sorted(_CONTROL - {"method"}))
        )
    config = from_tables(table_of("compare.controls.config", control.get("config", {})))
    own = {"method": "the control's method", "privacy.epsilon": "the control's epsilons"}
    _require_free("compare.controls.config: ", config, _AXES | _OF_ALL | own)
    return control | {"config": config}


def narrowed(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``compare`` table restricted to the options of the command line.

    Args:
        own: table of the plan file, with controls as :func:`controls_of` returns them.
        given: keys that replace the plan's. ``methods`` may name controls by their labels, and
            drops the controls that it does not name; ``epsilons`` also restricts the controls;
            ``baselines`` adds them to what is left. Those of the plan are lines as any other.
    """
    own = _expanded(own)
    controls = list(own.get("controls", []))
    new = {**own, **given}
    if "methods" in given:
        controls = [c for c in controls if _label(c) in given["methods"]]
        kept = set(map(_label, controls))
        new["methods"] = [name for name in given["methods"] if name not in kept]
    if "epsilons" in given:
        cut = [_at(control, given["epsilons"]) for control in controls]
        controls = [control for control in cut if control.get("epsilons") != []]
    return _expanded(new | {"controls": controls})


def _expanded(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``compare`` table with its baselines as methods and controls."""
    if own.get(BASELINES, False) is False:
        return dict(own)
    whole = {**_DEFAULTS, **own}
    _require_lists(whole)
    return with_baselines(whole)


def _require_lists(settings: Mapping[str, Any]) -> None:
    for key in ("methods", "epsilons"):
        if not isinstance(settings[key], list):
            raise ConfigError(f"compare.{key}={settings[key]!r} must be a list")
    controls_of(settings["controls"])


def _label(control: Mapping[str, Any]) -> Any:
    return control.get("label", control["method"])


def _at(control: Mapping[str, Any], epsilons: list[float]) -> dict[str, Any]:
    """Return a control restricted to the given ε, if it has its own list of them."""
    own = control.get("epsilons")
    cut = {"epsilons": [e for e in own if e in epsilons]} if isinstance(own, list) else {}
    return {**control, **cut}


def _control(control: Mapping[str, Any], epsilons: tuple[float, ...]) -> PlanEntry:
    own = _numbers("controls.epsilons", control.get("epsilons", list(epsilons)), float)
    method = _text("controls.method", control["method"])
    label = _text("controls.label", _label(control))
    return PlanEntry(label, own, {"method": method, **control["config"]})


def _entries(settings: Mapping[str, Any]) -> tuple[PlanEntry, ...]:
    epsilons = _numbers("epsilons", settings["epsilons"], float)
    names = settings["methods"]
    if not isinstance(names, list):
        raise ConfigError(f"compare.methods={names!r} must be a list of methods")
    entries = [PlanEntry(str(name), epsilons, {"method": name}) for name in names]
    entries += [_control(control, epsilons) for control in controls_of(settings["controls"])]
    labels = [entry.label for entry in entries]
    if not labels or len(set(map(slug, labels))) < len(labels):
        raise ConfigError(f"compare.methods={labels!r} must be different names, at least one")
    return tuple(entries)


def _reference(value: object, entries: Sequence[PlanEntry]) -> str:
    """Return the label of the reference: the first line, unless the plan names another."""
    labels = [entry.label for entry in entries]
    if value is not None and value not in labels:
        raise ConfigError(f"compare.reference={value!r} must be one of {', '.join(labels)}")
    return labels[0] if value is None else str(value)


def _tuning(value: object) -> Tuning | None:
    if value is None:
        return None
    raw = table_of("compare.tune", value)
    if wrong := _TUNE ^ raw.keys():
        raise ConfigError(f"compare.tune.{min(wrong)}: its keys must be {', '.join(sorted(_TUNE))}")
    grid = _numbers("tune.grid", raw["grid"], float)
    seeds = _numbers("tune.seeds", raw["seeds"], int)
    fraction = raw["test-fraction"]
    if type(fraction) not in (int, float):
        raise ConfigError(f"compare.tune.test-fraction={fraction!r} must be a number in (0, 1)")
    return Tuning(grid, seeds, as_float(fraction))


def _name(value: object) -> str:
    """Return the name of the comparison's folder, which must lie below the output folder."""
    name = slug(_text("name", value))
    if name in ("", ".", ".."):
        raise ConfigError(f"compare.name={value!r} must be the name of a folder")
    return name


def read_plan(tables: Mapping[str, Any], defaults: Mapping[str, Any]) -> Plan:
    """Return the checked plan of a comparison.

    Args:
        tables: keys that all runs share, and the table ``compare``: ``name``, ``nodes``,
            ``methods``, ``epsilons``, ``seeds``, ``controls`` (each a ``method`` with ``label``,
            ``epsilons``, ``config``), ``tune`` (``grid``, ``seeds``, ``test-fraction``),
            ``baselines`` and ``reference`` (a label). The defaults are the five methods of the
            paper at ε = 1, 3, inf with seeds 0, 1, 2.
        defaults: flat run config of the app.

    Raises:
        ConfigError: if the config of one of the runs is not valid.
    """
    own = table_of("compare", tables.get("compare", {}))
    if unknown := own.keys() - _DEFAULTS.keys():
        raise ConfigError(f"compare.{min(unknown)} must be one of {', '.join(_DEFAULTS)}")
    settings = _DEFAULTS | _expanded(own)
    if type(settings["nodes"]) is not int or settings["nodes"] < 1:
        raise ConfigError(f"compare.nodes={settings['nodes']!r} must be an integer of at least 1")
    shared = from_tables({key: value for key, value in tables.items() if key != "compare"})
    entries = _entries(settings)
    plan = Plan(
        name=_name(settings["name"]),
        nodes=settings["nodes"],
        entries=entries,
        seeds=_numbers("seeds", settings["seeds"], int),
        tuning=_tuning(settings["tune"]),
        config={**defaults, **shared},
        defaults=defaults,
        reference=_reference(settings["reference"], entries),
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


def to_json(tables: Mapping[str, Any]) -> str:
    """Return a plan's tables as JSON; parsed, they are valid tables for :func:`read_plan`."""
    return json.dumps(tables, indent=2) + "\n"
