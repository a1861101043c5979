"""How a site's own files are read: columns, classes and file format, by its node config.

The server chooses only the order of the classes. Otherwise a site's refusals would tell the server,
without noise, whether a column holds its labels.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from lalora_app.data.labels import is_integer, listed
from lalora_app.privacy.policy import PolicyError
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import AUTO, NONE
from lalora_app.settings.run_config import Config, Data, flatten
from lalora_app.settings.value_rules import CLASSES_LAW, VALUES_LAW, are_classes, class_names_in

# Keys of a node config, with their defaults.
_COLUMNS = {"input-column": "text", "label-column": "label"}
_TASKS = ("task-column", "task-values", "class-tasks")
_NUM_LABELS = 2
_LABELS = ("labels", "num-labels")
_OPEN = {"data.labels": AUTO, "data.num-labels": 0}  # what a run leaves to the data
_FORMAT: dict[str, str | float] = {"encoding": AUTO, "separator": AUTO, "white-level": 0.0}


def _own_value(node: Mapping[str, object], key: str, default: str | int | bool) -> Any:
    value, kind = node.get(key, default), type(default)
    if type(value) is not kind:
        wanted = {str: "a name", int: "an integer", bool: "true or false"}[kind]
        raise ConfigError(f"node config {key}={value!r} must be {wanted}")
    return value


def _require_equal(key: str, wanted: object, own: object) -> None:
    if wanted != own:
        raise PolicyError(
            f"data.{key}={json.dumps(wanted)} must be {json.dumps(own)}, "
            "the node config's value or its default"
        )


def check_columns(config: Config, node: Mapping[str, object]) -> None:
    """Check that a run names the same columns of a node's own data as the node config.

    Raises:
        ConfigError: if the node config has keys on data without ``data-path``, or one of a wrong
            type.
        PolicyError: if the run names another column.
    """
    if "data-path" not in node:
        for key in {*_COLUMNS, *_TASKS, *_LABELS, *_FORMAT} & node.keys():
            raise ConfigError(f"node config {key}={node[key]!r} needs data-path")
        return
    asked = flatten(config)
    for key, default in _COLUMNS.items():
        _require_equal(key, asked[f"data.{key}"], _own_value(node, key, default))
    if config.has_tasks:
        _check_tasks(config.data, node)


def _check_tasks(data: Data, node: Mapping[str, object]) -> None:
    """Check that a site allows a run to divide its data into tasks.

    The server may learn the number of examples of each task, so the site decides. It also names
    the values of the column: else a server could ask, without noise, whether a row has a value.

    Raises:
        ConfigError: if a key of the node config has the wrong type or form.
        PolicyError: if the site allows no such division.
    """
    if not data.by_column:
        if _own_value(node, "class-tasks", False) is not True:
            raise PolicyError(
                f"data.tasks={data.tasks} must be 1: the node config does not allow class-tasks"
            )
        return
    _require_equal("task-column", data.task_column, _own_value(node, "task-column", NONE))
    text = _own_value(node, "task-values", "")
    if not are_classes(text) or text == AUTO:
        raise ConfigError(f"node config task-values={text!r} {VALUES_LAW}")
    if data.task_values == AUTO or set(data.divided) != set(class_names_in(text)):
        raise PolicyError(
            f"data.task-values={json.dumps(data.task_values)} must be the names "
            f"{json.dumps(text)}, the value in the node config"
        )


def _own_format(node: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of ``Data`` on the format of a site's own files; never the server's."""
    laws = {item.name.replace("_", "-"): item for item in fields(Data)}
    found: dict[str, Any] = {}
    for key, default in _FORMAT.items():
        value = node.get(key, default)
        value = float(value) if type(value) is int and type(default) is float else value
        item = laws[key]
        if type(value) is not type(default) or not item.metadata["holds"](value):
            raise ConfigError(f"node config {key}={value!r} {item.metadata['law']}")
        found[item.name] = value
    return found


def _with_counted_classes(data: Data, node: Mapping[str, object]) -> Data:
    """Return how labels that are the integers from 0 are read, in the run's order of the classes.

    Raises:
        ConfigError: if the node config's number of classes is no integer.
        PolicyError: if the run has another number of classes, or other integers.
    """
    count = _own_value(node, "num-labels", _NUM_LABELS)
    _require_equal("num-labels", data.num_labels, count)
    names, own = data.class_names, tuple(map(str, range(count)))
    if any(map(is_integer, names)) and set(names) != set(own):
        raise PolicyError(
            f"data.labels={json.dumps(data.labels)} must be the integers from 0 to "
            f"{count - 1}, as the node config has no labels"
        )
    return replace(data, labels=listed(names if set(names) == set(own) else own))


def _require_named_classes(data: Data, node: Mapping[str, object]) -> None:
    """Check that a run has the classes that a node config names, in any order.

    Raises:
        ConfigError: if ``labels`` breaks its law, or ``num-labels`` is another number.
        PolicyError: if the run has other classes.
    """
    text = _own_value(node, "labels", "")
    if not are_classes(text) or text == AUTO:
        raise ConfigError(f"node config labels={text!r} {CLASSES_LAW}")
    own = class_names_in(text)
    if "num-labels" in node and _own_value(node, "num-labels", 0) != len(own):
        raise ConfigError(
            f"node config num-labels={node['num-labels']} must be {len(own)}, the number of names "
            "in labels"
        )
    if set(data.class_names) != set(own):
        raise PolicyError(
            f"data.labels={json.dumps(data.labels)} must be the names {json.dumps(text)}, "
            "the value in the node config"
        )


def _with_own_classes(data: Data, node: Mapping[str, object]) -> Data:
    """Return how a site's own labels are read: the run's classes, in the run's order."""
    if data.label_column == NONE:
        return data
    if "labels" not in node:
        return _with_counted_classes(data, node)
    _require_named_classes(data, node)
    return data


def own_data(config: Config, node: Mapping[str, object]) -> Data:
    """Return how a site's own files are read.

    Raises:
        ConfigError: if a key of the node config breaks its law.
        PolicyError: if the run has other classes than the node config.
    """
    return replace(_with_own_classes(config.data, node), **_own_format(node))


def keys_of_run(node: Mapping[str, object], given: Mapping[str, object]) -> dict[str, Any]:
    """Return the keys on columns and classes of a run that a site checks by itself.

    A server takes the classes that its config leaves open from its own data, which a site does not
    have. Here the site's own classes stand in their place.

    Args:
        node: the node config.
        given: the keys that the run's config sets.
    """
    own = {f"data.{key}": node.get(key, default) for key, default in _COLUMNS.items()}
    found = own | {key: value for key, value in given.items() if _OPEN.get(key) != value}
    labels = found.setdefault("data.labels", node.get("labels", AUTO))
    count = node.get("num-labels", _NUM_LABELS) if labels == AUTO else 0
    return {"data.num-labels": count} | found
