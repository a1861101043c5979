"""Read data from the bundled demo, from local files and folders, or from the Hugging Face hub."""

import glob
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lalora_app.data.delimited import TextFormat, kind_of
from lalora_app.data.local_tables import load_in_memory
from lalora_app.settings.errors import DataError, first_line
from lalora_app.settings.names import FILE_KINDS, NONE, full_path, has_file_kind, is_local

DEMO = "demo:sms-spam"
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of datasets; others: csv
_KNOWN = f"one of {', '.join(FILE_KINDS)} (all but .parquet also with .gz)"


class Columns(dict[str, list[Any]]):
    """The values of each column by its name.

    Attributes:
        untyped: whether all values are texts because the file has no types.
        classes: the class names of each column that holds their positions, such as the folders of
            images by class.
    """

    untyped = False
    classes: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def quiet_hub() -> None:
    """Silence the hub client's line per retry; a failure is reported once, as a `DataError`."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def has_one_split(name: str) -> bool:
    """Tell whether a name has only one split: the demo, or an existing single file."""
    return name == DEMO or (is_local(name) and full_path(name).is_file())


def _demo() -> dict[str, list[Any]]:
    text = resources.files("lalora_app").joinpath("assets/sms_spam.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {column: [row[column] for row in rows] for column in rows[0]}


def _columns(table: Any, wanted: Iterable[str]) -> Columns:
    """Return columns as lists; images stay encoded files.

    Raises:
        UnicodeDecodeError: for a damaged text; the readers of typed files do not look for one.
    """
    from datasets import ClassLabel, Image

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
    # whole columns: row by row takes ten times longer
    columns = Columns({name: table[name][:] for name in wanted})
    features = {name: table.features[name] for name in columns}
    columns.classes = {n: tuple(f.names) for n, f in features.items() if isinstance(f, ClassLabel)}
    return columns


def _size_and_times(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    # The time of the inode's last change: a program can set the other one back.
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp(name: str) -> str:
    """Return a hash of names, sizes and times of change of a file, or of a folder's files.

    Limit: a missing path counts as an empty folder; reading it raises the error.
    """
    root = full_path(name)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    listed = [(str(f.relative_to(root)), *_size_and_times(f)) for f in files]
    return hashlib.sha256(json.dumps([str(root), listed]).encode()).hexdigest()


def _source(key: str, path: Path, split: str) -> dict[str, Any]:
    if path.is_dir():
        if glob.has_magic(str(path)):  # datasets would take it for a pattern, and find no file
            raise DataError(key, f'="{path}" must be a path without * ? [ for a folder')
        return {"path": str(path)}
    if not path.is_absolute():
        raise DataError(
            key, f'="{path}" must be an absolute path, or one that starts with ~, for a local file'
        )
    if not has_file_kind(path.name) or not path.is_file():
        raise DataError(key, f'="{path}" must be an existing folder, or a file ending in {_KNOWN}')
    # Brackets and stars of a file's name are no pattern.
    reader = _READERS.get(kind_of(path), "csv")
    return {"path": reader, "data_files": {split: glob.escape(str(path))}}


def _load_local(key: str, path: Path, split: str, form: TextFormat) -> tuple[Any, bool]:
    from datasets import disable_progress_bars

    disable_progress_bars()
    quiet_hub()
    source = _source(key, path, split)
    kind = "a folder of data files or images" if path.is_dir() else kind_of(path)
    try:
        return load_in_memory(source, split, form)
    except Exception as error:  # the readers raise many kinds of errors
        where = f", with a split {split}" if path.is_dir() else ""
        reason = _reason(error)
        raise DataError(key, f'="{path}" cannot be read as {kind}{where}: {reason}') from error


def _reason(error: Exception) -> str:
    """Return the reason of a reader's error, which `datasets` wraps into a general one."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _load_hub(key: str, name: str, subset: str, split: str) -> Any:
    from datasets import load_dataset

    quiet_hub()
    try:
        return load_dataset(name, None if subset == NONE else subset, split=split)
    except Exception as error:  # the hub client raises many kinds of errors
        raise DataError(
            key,
            f'="{name}" (split {split}) cannot be loaded from the hub and is not in the local '
            f"cache: {first_line(error)}",
        ) from error


def _table(key: str, name: str, subset: str, split: str, form: TextFormat) -> tuple[Any, bool]:
    if name != DEMO and (is_local(name) or has_file_kind(name)):
        return _load_local(key, full_path(name), split, form)
    try:
        form.require_unused()
    except ValueError as error:
        raise DataError(key, f'="{name}": {error}') from error
    return _demo() if name == DEMO else _load_hub(key, name, subset, split), False


def read(
    key: str,
    name: str,
    subset: str,
    split: str,
    wanted: Mapping[str, str],
    form: TextFormat | None = None,
) -> Columns:
    """Return the wanted columns of one split of a dataset.

    Args:
        key: the config key that named the data, for errors.
        name: ``demo:sms-spam``, a path (absolute, or with ~) of a file in one of the formats, of a
            folder of such files or of images by class, or an id of the hub.
        subset: of a hub dataset, such as ``sst2`` of GLUE, or ``none``.
        split: name of the split, such as ``train``; a single file has any split.
        wanted: name of each column -> the config key that names it.
        form: how text files are read; None: as their content tells.

    Raises:
        DataError: if the data is missing, damaged or empty, cannot be fetched, or lacks a column.
    """
    form = replace(form or TextFormat(), wanted=tuple(wanted))
    table, untyped = _table(key, name, subset, split, form)
    found = list(table) if isinstance(table, dict) else table.column_names
    if not found or not len(table[found[0]]):
        raise DataError(key, f'="{name}" must hold at least one example')
    for column, asked_by in wanted.items():
        if column not in found:
            there = ", ".join(found)
            raise DataError(asked_by, f'="{column}" must be a column of the data: {there}')
    if isinstance(table, dict):
        return Columns({column: table[column] for column in wanted})
    try:
        columns = _columns(table, wanted)
    except UnicodeDecodeError as error:
        raise DataError(key, f'="{name}" holds a damaged text: {first_line(error)}') from error
    columns.untyped = untyped
    return columns
