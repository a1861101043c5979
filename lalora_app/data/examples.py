"""Read and check examples, and split them by content or by the dataset's own test split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from lalora_app.data.contents import Content, content_of, inputs_of, require_texts
from lalora_app.data.delimited import TextFormat
from lalora_app.data.labels import (
    listed,
    name_of,
    places,
    positions,
    require_classes,
    shown,
    sorted_names,
)
from lalora_app.data.sources import has_one_split, read
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.names import AUTO, NONE, full_path
from lalora_app.settings.run_config import Data
from lalora_app.settings.value_rules import are_classes, class_name


@dataclass(frozen=True)
class Examples:
    """Contents with their labels, and the group of each for the ``natural-id`` partitioner.

    Attributes:
        contents: texts, pairs of texts, or the bytes of image files.
        labels: (examples,); all 0 where the data has none.
        groups: (examples,), values of ``data.client-column``; empty: no groups.
        values: (examples,), positions of their ``data.task-column`` in ``data.task-values``; empty:
            the tasks of the run divide no column.
        rows: (examples,), positions in the original data, for error messages; empty: 0, 1, 2, ...
        names: (examples,), names of image files, for error messages; "" or empty: no name.
        white_level: ``data.white-level`` of the images.
    """

    contents: tuple[Content, ...]
    labels: tuple[int, ...]
    groups: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    white_level: float = 0.0
    values: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> "Examples":
        """Return the given examples."""
        contents = tuple(self.contents[i] for i in rows)
        labels = tuple(self.labels[i] for i in rows)
        groups = tuple(self.groups[i] for i in rows if self.groups)
        names = tuple(self.names[i] for i in rows if self.names)
        values = tuple(self.values[i] for i in rows if self.values)
        found = tuple(map(self.row, rows))
        return Examples(contents, labels, groups, found, names, self.white_level, values)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of contents and labels, computed once per object; a key for caches."""
        found = hashlib.sha256(repr((self.white_level, self.labels)).encode())
        for content in self.contents:
            raw = content if isinstance(content, bytes) else repr(content).encode()
            found.update(f"{type(content).__name__} {len(raw)} ".encode())
            found.update(raw)
        return found.hexdigest()

    def row(self, index: int) -> int:
        """Return the position of an example in the data that it was read from."""
        return self.rows[index] if self.rows else index

    def place(self, index: int) -> str:
        """Return where an example was read, for an error: its row, and its file if it has one."""
        name = self.names[index] if self.names else ""
        return f"row {self.row(index)}" + (f" ({name})" if name else "")


def _wanted(data: Data, natural: bool) -> dict[str, str]:
    """Return the columns that the run needs, each with its config key."""
    wanted = {name: "data.input-column" for name in inputs_of(data)}
    if data.label_column != NONE:
        wanted[data.label_column] = "data.label-column"
    if natural:
        wanted[data.client_column] = "data.client-column"
    if data.by_column:
        wanted[data.task_column] = "data.task-column"
    return wanted


@dataclass(frozen=True)
class _Rows:
    """One split of a dataset, with its labels as texts.

    Attributes:
        contents: as in :class:`Examples`.
        names: as in :class:`Examples`.
        labels: the text of each label; empty: the data has none.
        classes: the data's own class names; empty: it has none.
        groups: as in :class:`Examples`.
        values: the text of each row's ``data.task-column``; empty: no column is divided.
    """

    contents: tuple[Content, ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    values: tuple[str, ...] = ()

    def examples(self, data: Data) -> Examples:
        """Return the rows with the position of each label among ``data.class_names``."""
        labels = positions(self.labels, data.class_names) or (0,) * len(self.contents)
        known = {name: place for place, name in enumerate(data.divided)}
        values = places(self.values, known, data.divided, "data.task-values", "value")
        white = data.white_level
        return Examples(self.contents, labels, self.groups, (), self.names, white, values)


def _label(value: Any, classes: Sequence[str], data: Data, row: int) -> str:
    """Return a label's text."""
    where = f'="{data.label_column}": row {row} has '
    if not (text := name_of(value, classes, "data.label-column", where, "label")):
        raise DataError("data.label-column", f"{where}no label")
    return text


def _task_value(value: Any, classes: Sequence[str], data: Data, row: int) -> str:
    """Return the text of a value of ``data.task-column``, spelled as labels are."""
    where = f'="{data.task_column}": row {row} has '
    return name_of(value, classes, "data.task-column", where, "value")


def _rows(
    key: str, name: str, subset: str, split: str, data: Data, *, natural: bool = False
) -> _Rows:
    """Read one split and check every row; with ``natural``, also read the client column."""
    form = TextFormat(data.encoding, data.separator)
    columns = read(key, name, subset, split, _wanted(data, natural), form)
    require_texts(columns, data)
    values = zip(*(columns[column] for column in inputs_of(data)), strict=True)
    found = [content_of(value, data, row) for row, value in enumerate(values)]
    contents, names = (tuple(part) for part in zip(*found, strict=True))
    raw = columns.get(data.label_column, [])
    classes = tuple(map(class_name, columns.classes.get(data.label_column, ())))
    labels = tuple(_label(label, classes, data, row) for row, label in enumerate(raw))
    groups = tuple(map(str, columns[data.client_column])) if natural else ()
    divided = columns[data.task_column] if data.by_column else ()
    known = columns.classes.get(data.task_column, ())
    tasks = tuple(_task_value(value, known, data, row) for row, value in enumerate(divided))
    return _Rows(contents, names, labels, classes, groups, tasks)


def _as_bytes(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    return "\0".join([content] if isinstance(content, str) else content).encode()


def is_test(content: Content, fraction: float) -> bool:
    """Tell whether an example is in the test split, by a hash of its content (equal for copies)."""
    digest = hashlib.sha256(_as_bytes(content)).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _check_test_split(data: Data) -> None:
    """Refuse a test split that has the same examples as the training split."""
    if data.test_split == NONE:
        return
    if has_one_split(data.name):
        raise DataError(
            "data.test-split", f'="{data.test_split}" must be "none": one file has one split'
        )
    if data.test_split == data.train_split:
        raise DataError(
            "data.test-split", f'="{data.test_split}" must be another than data.train-split'
        )


@lru_cache(maxsize=4)
def run_rows(data: Data) -> tuple[_Rows, _Rows | None]:
    """Return training and test rows of the run's dataset; None: the test rows are a share.

    Args:
        data: the dataset, without its labels' order, so that one reading serves any order.
    """
    _check_test_split(data)
    natural = data.partitioner == "natural-id"
    where = (data.name, data.subset)
    train = _rows("data.name", *where, data.train_split, data, natural=natural)
    if data.test_split == NONE:
        return train, None
    return train, _rows("data.name", *where, data.test_split, data)


def without_names(data: Data) -> Data:
    """Return the dataset without the names that :func:`run_rows` does not depend on."""
    return replace(data, labels=AUTO, num_labels=0, task_values=AUTO)


def with_classes(data: Data) -> Data:
    """Return the same dataset with its class names in ``labels``, and their number.

    Names that the config leaves open are taken from all rows that the server reads itself: the
    data's own class names, else the integers from 0 to ``num_labels`` - 1 if all labels are such
    integers, else the different labels, sorted.

    Raises:
        ConfigError: if the number of names is not ``num_labels``, or below 2.
        DataError: if the data cannot be read.

    Privacy: called by the server and in a simulation, never on a client's own data.
    """
    if data.label_column == NONE:
        return data
    names = data.class_names if data.labels != AUTO else _found_names(data)
    if data.num_labels not in (0, len(names)):
        raise ConfigError(
            f"data.num-labels={data.num_labels} must be {len(names)}, the number of classes: "
            f"{shown(names)}"
        )
    if len(names) < 2:
        raise ConfigError(
            f'data.labels="auto" must find at least 2 classes in the data, and finds '
            f'{shown(names)}; name all of them, such as data.labels="ham,spam"'
        )
    # Names of the config stay as they are written: a comparison looks for them in finished runs.
    text = data.labels if data.labels != AUTO else listed(names)
    if not are_classes(text):
        raise ConfigError(f'data.labels="auto" must find different names, and finds {shown(names)}')
    return replace(data, labels=text, num_labels=len(names))


def _found_names(data: Data) -> tuple[str, ...]:
    train, test = run_rows(without_names(data))
    if train.classes:
        return train.classes
    require_classes(train.labels, data.label_column)
    found = sorted_names({*train.labels, *(test.labels if test else ())})
    counted = tuple(map(str, range(data.num_labels)))
    return counted if set(found) <= set(counted) else found


@lru_cache(maxsize=4)
def split(data: Data) -> tuple[Examples, Examples]:
    """Return (train, test) of the run's dataset.

    The test examples are the split ``data.test-split``. If it is ``none``, they are a share of the
    training split, chosen by a hash of each content.

    Raises:
        DataError: if the dataset is missing, lacks a column or has an unusable row, or if the test
            split would be the training split.
    """
    rows, test = run_rows(without_names(data))
    train = rows.examples(data)
    if test is not None:
        return train, test.examples(data)
    sides: tuple[list[int], list[int]] = ([], [])
    for i, content in enumerate(train.contents):
        sides[is_test(content, data.test_fraction)].append(i)
    if not all(sides):
        raise DataError("data.test-fraction", f"={data.test_fraction} leaves a side empty")
    return train.take(sides[0]), train.take(sides[1])


def private_file(path: str, data: Data) -> Examples:
    """Return the examples of a real client's own file or folder (``data-path`` of its node)."""
    full = str(full_path(path).resolve())  # a relative path is no id of the hub
    return _rows("data-path", full, NONE, "train", data).examples(data)


def check_client(size: int, *, batch_size: int, delta: float) -> None:
    """Check that a client of ``size`` examples can take part in the run.

    Raises:
        DataError: if the client has no examples or fewer than the expected batch, or δ is not below
            1/size.
    """
    if size == 0:
        raise DataError("data", ": a client must have at least one example")
    if batch_size > size:
        raise DataError(
            "train.batch-size", f"={batch_size} must be at most the client's number of examples"
        )
    if delta >= 1 / size:
        raise DataError(
            "privacy.delta", f"={delta} must be below 1/n, n the client's number of examples"
        )
