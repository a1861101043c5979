"""Read and check examples, and split them by content or by the dataset's own test split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lalora_app.data.sources import has_one_split, read
from lalora_app.settings.errors import DataError
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.run_config import Data

Content = str | tuple[str, ...] | bytes  # a text, a pair of texts, or an encoded image


@dataclass(frozen=True)
class Examples:
    """Contents with their labels, and the group of each for the ``natural-id`` partitioner.

    Attributes:
        contents: texts, pairs of texts, or the bytes of image files.
        labels: (examples,); all 0 where the data has none.
        groups: (examples,), values of ``data.client-column``; empty: no groups.
        rows: (examples,), positions in the original data, for error messages; empty: 0, 1, 2, ...
    """

    contents: tuple[Content, ...]
    labels: tuple[int, ...]
    groups: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> "Examples":
        """Return the given examples."""
        contents = tuple(self.contents[i] for i in rows)
        labels = tuple(self.labels[i] for i in rows)
        groups = tuple(self.groups[i] for i in rows if self.groups)
        return Examples(contents, labels, groups, tuple(map(self.row, rows)))

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of contents and labels, computed once per object; a key for caches."""
        found = hashlib.sha256(repr(self.labels).encode())
        for content in self.contents:
            raw = content if isinstance(content, bytes) else repr(content).encode()
            found.update(f"{type(content).__name__} {len(raw)} ".encode())
            found.update(raw)
        return found.hexdigest()

    def row(self, index: int) -> int:
        """Return the position of an example in the data that it was read from."""
        return self.rows[index] if self.rows else index


def _inputs_of(data: Data) -> list[str]:
    return [name.strip() for name in data.input_column.split(",")]


def _wanted(data: Data, natural: bool) -> dict[str, str]:
    """Return the columns that the run needs, each with its config key."""
    wanted = {name: "data.input-column" for name in _inputs_of(data)}
    if data.label_column != NONE:
        wanted[data.label_column] = "data.label-column"
    if natural:
        wanted[data.client_column] = "data.client-column"
    return wanted


def _bad_input(data: Data, row: int, found: str) -> DataError:
    return DataError("data.input-column", f'="{data.input_column}": row {row} has {found}')


def _image_bytes(value: dict[str, Any], data: Data, row: int) -> bytes:
    if isinstance(given := value.get("bytes"), bytes) and given:
        return given
    try:
        return Path(str(value["path"])).read_bytes()
    except (OSError, KeyError, ValueError) as error:  # ValueError: of a name with a zero byte
        raise _bad_input(data, row, "no image") from error


def _content(values: tuple[Any, ...], data: Data, row: int) -> Content:
    if len(values) == 1 and isinstance(values[0], dict):
        return _image_bytes(values[0], data, row)
    if not all(isinstance(v, str) for v in values) or not any(v.strip() for v in values):
        raise _bad_input(data, row, "no text or image")
    return values[0] if len(values) == 1 else values


def _label(label: object, data: Data, row: int) -> int:
    if type(label) is not int or not 0 <= label < data.num_labels:
        raise DataError(
            "data.num-labels",
            f"={data.num_labels}: row {row} has label {label!r}, which must be an integer "
            f"from 0 to {data.num_labels - 1}",
        )
    return label


def _examples(
    key: str, name: str, subset: str, split: str, data: Data, *, natural: bool = False
) -> Examples:
    """Read one split and check every row; with ``natural``, also read the client column."""
    columns = read(key, name, subset, split, _wanted(data, natural))
    rows = zip(*(columns[column] for column in _inputs_of(data)), strict=True)
    contents = tuple(_content(values, data, row) for row, values in enumerate(rows))
    raw = columns.get(data.label_column, [0] * len(contents))
    labels = tuple(_label(label, data, row) for row, label in enumerate(raw))
    groups = tuple(map(str, columns[data.client_column])) if natural else ()
    return Examples(contents, labels, groups)


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
def split(data: Data) -> tuple[Examples, Examples]:
    """Return (train, test) of the run's dataset.

    The test examples are the split ``data.test-split``. If it is ``none``, they are a share of the
    training split, chosen by a hash of each content.

    Raises:
        DataError: if the dataset is missing, lacks a column or has an unusable row, or if the test
            split would be the training split.
    """
    _check_test_split(data)
    natural = data.partitioner == "natural-id"
    where = (data.name, data.subset, data.train_split)
    train = _examples("data.name", *where, data, natural=natural)
    if data.test_split != NONE:
        return train, _examples("data.name", data.name, data.subset, data.test_split, data)
    sides: tuple[list[int], list[int]] = ([], [])
    for i, content in enumerate(train.contents):
        sides[is_test(content, data.test_fraction)].append(i)
    if not all(sides):
        raise DataError("data.test-fraction", f"={data.test_fraction} leaves a side empty")
    return train.take(sides[0]), train.take(sides[1])


def private_file(path: str, data: Data) -> Examples:
    """Return the examples of a real client's own file or folder (``data-path`` of its node)."""
    full = str(full_path(path).resolve())  # a relative path is no id of the hub
    return _examples("data-path", full, NONE, "train", data)


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
