"""Tasks over time: the classes, or the values of a column, that each block of rounds trains on."""

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np

from lalora_app.data.examples import Examples, run_rows, with_classes, without_names
from lalora_app.data.labels import listed, shown, sorted_names
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import AUTO
from lalora_app.settings.run_config import Config, Data
from lalora_app.settings.value_rules import are_classes


@dataclass(frozen=True)
class Division:
    """A division of all examples into tasks; an example is in exactly one of them.

    Attributes:
        kind: "classes" or "column", which decides how a row is read.
        column: the column whose values are divided.
        values: the values that are divided, as the run lists them.
        tasks: the task (from 0) of each value.
    """

    kind: str
    column: str
    values: tuple[str, ...]
    tasks: tuple[int, ...]

    @property
    def name(self) -> str:
        """A hash of the division.

        Privacy: it covers all that decides on the task of a row: the kind, the column, and the
        values in their order, since a file may hold positions in it.
        """
        kept = json.dumps([self.kind, self.column, self.values, self.tasks])
        return hashlib.sha256(kept.encode()).hexdigest()[:32]

    def part(self, task: int) -> str:
        """Return the name of a task's examples in the ledger, one of disjoint parts."""
        return f"{self.name}/{task + 1}"

    def values_of(self, task: int) -> tuple[str, ...]:
        """Return the values of a task, as the run lists them."""
        both = zip(self.values, self.tasks, strict=True)
        return tuple(value for value, own in both if own == task)


def with_task_values(data: Data) -> Data:
    """Return the same dataset with the values of ``data.task-column`` named, in order.

    Values that the config leaves open are those of the training split, sorted.

    Raises:
        ConfigError: if there are fewer than 2 values.
        DataError: if the data cannot be read, or a row has no value.

    Privacy: called by the server and in a simulation, never on a client's own data.
    """
    if not data.by_column or data.task_values != AUTO:
        return data
    found = sorted_names(run_rows(without_names(data))[0].values)
    text = listed(found)
    if not are_classes(text):
        raise ConfigError(
            f'data.task-values="auto" must find 2 different values in "{data.task_column}", and '
            f"finds {shown(found)}"
        )
    return replace(data, task_values=text)


def with_names(data: Data) -> Data:
    """Return the same dataset with its classes named, and the values of its task column.

    Raises:
        ConfigError: if a list of names does not fit the others.
        DataError: if the data cannot be read.

    Privacy: called by the server and in a simulation, never on a client's own data.
    """
    return with_task_values(with_classes(data))


def division_of(config: Config) -> Division:
    """Return the division of a run's examples into its tasks, in groups of about equal size.

    Args:
        config: the run's config, with its classes or values named.

    Limit: one task has all values.

    Raises:
        ConfigError: if there are fewer values than tasks, or with ``model.task-heads`` fewer than
            two for a task.
    """
    data, count = config.data, len(config.data.divided)
    divided = "values of data.task-column" if data.by_column else "classes"
    if count == 0:
        raise ConfigError(f"data.tasks={data.tasks} needs the names of all {divided}")
    if count < data.tasks:
        raise ConfigError(
            f"data.tasks={data.tasks} must be at most {count}, the number of {divided}"
        )
    if config.model.task_heads and count < 2 * data.tasks:
        raise ConfigError(
            f"data.tasks={data.tasks} must be at most {count // 2} for model.task-heads=true and "
            f"{count} classes: with one class in a task there is nothing to choose"
        )
    order = np.arange(count)
    if data.task_order == "seeded":
        order = np.random.default_rng(config.seed).permutation(count)
    tasks = np.empty(count, dtype=int)
    for task, places in enumerate(np.array_split(order, data.tasks)):
        tasks[places] = task
    read = ("column", data.task_column) if data.by_column else ("classes", data.label_column)
    return Division(*read, data.divided, tuple(tasks.tolist()))


def closed_classes(config: Config, task: int) -> tuple[bool, ...]:
    """Return for each class whether another task than this has it; () if heads are not divided."""
    if not config.model.task_heads:
        return ()
    return tuple(own != task for own in division_of(config).tasks)


def of_task(examples: Examples, config: Config, task: int) -> Examples:
    """Return the examples of one task, in their order.

    Limit: a run without tasks has all examples in task 0.

    Privacy: whether an example is taken depends on that example alone.
    """
    if not config.has_tasks:
        return examples
    tasks = division_of(config).tasks
    places = examples.values if config.data.by_column else examples.labels
    return examples.take([row for row, place in enumerate(places) if tasks[place] == task])
