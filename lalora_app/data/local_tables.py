"""Local files as tables in this process's memory: no copy of private data is written to a disk.

For typed files, the readers of `datasets` choose the types, as in `load_dataset`. That function
keeps its table in a cache folder, which a killed process leaves behind. Here the readers write
their table to fsspec's memory file system instead, and archives are read without unpacking.
"""

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from lalora_app.data.delimited import SUFFIXES, TextFormat, kind_of, read_files

Tables = dict[str, pa.Table]  # of each split


def _split_files(builder: Any) -> dict[str, list[Path]]:
    """Return the delimited text files of each split; empty: the data is of another kind.

    Raises:
        ValueError: for a text file in an archive other than .gz, in which `datasets` would choose
            the types, and would take texts such as ``NA`` for missing.
    """
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.text.text import Text

    found = builder.config.data_files or {}
    files = {str(name): [Path(str(file)) for file in paths] for name, paths in found.items()}
    every = [file for paths in files.values() for file in paths]
    other = [file.name for file in every if kind_of(file) not in SUFFIXES]
    if other and isinstance(builder, Csv | Text):
        raise ValueError(f"{other[0]} must end in {', '.join(SUFFIXES)}, or one of them with .gz")
    return files if every and not other else {}


def _text_tables(files: dict[str, list[Path]], form: TextFormat) -> Tables:
    """Return the tables of delimited text files, every column of texts."""
    found = {name: read_files(paths, form) for name, paths in files.items()}
    return {
        name: pa.table(
            {column: pa.array(values, pa.large_string()) for column, values in c.items()}
        )
        for name, c in found.items()
    }


def _prepared_tables(memory: Any, where: str, builder: Any) -> Tables:
    """Return one table per split, as the reader of `datasets` writes it to a memory folder."""
    from datasets import StreamingDownloadManager
    from datasets.packaged_modules.json.json import JsonConfig

    if isinstance(builder.config, JsonConfig):
        # A byte order mark is no part of the data. For "utf-8" the reader does not check the bytes.
        builder.config.encoding = "utf-8-sig"
    manager = StreamingDownloadManager(
        base_path=builder.base_path, dataset_name=builder.dataset_name
    )
    builder.download_and_prepare(f"{where}/tables", dl_manager=manager)
    return {name: _read_split(memory, where, name) for name in builder.info.splits}


def _read_split(memory: Any, where: str, name: str) -> pa.Table:
    """Return the table of one split, which a large split has in several files."""
    single = memory.glob(f"{where}/tables/*-{name}.arrow")
    files = single or sorted(memory.glob(f"{where}/tables/*-{name}-?????-of-?????.arrow"))
    tables = []
    for file in files:
        with memory.open(file) as stream:
            tables.append(pa.ipc.open_stream(stream).read_all())
    return pa.concat_tables(tables)


def _select(tables: Tables, split: str) -> pa.Table:
    """Return the rows that a split's name selects, such as ``train`` or ``train[:80%]``."""
    from datasets import ReadInstruction

    sizes = {name: table.num_rows for name, table in tables.items()}
    wanted = ReadInstruction.from_spec("+".join(sizes) if split == "all" else split)
    parts = wanted.to_absolute(sizes)
    return pa.concat_tables(
        tables[part.splitname].slice(part.from_, part.to - part.from_) for part in parts
    )


def load_in_memory(source: dict[str, Any], split: str, form: TextFormat) -> tuple[Any, bool]:
    """Return one split of local data as a `datasets.Dataset`, and whether it lacks types.

    Delimited text files are read by :mod:`delimited`, so all their values are texts; any other data
    equals that of `load_dataset`.

    Args:
        source: ``path`` and ``data_files`` as in `load_dataset`.
        split: name of the split, with an optional slice.
        form: how text files are read.

    Raises:
        Exception: of many kinds, if the data cannot be read or has no such split.

    Privacy: nothing is written to a disk, so nothing is left behind by a killed process.
    """
    from datasets import Dataset, load_dataset_builder

    memory = fsspec.filesystem("memory")
    where = f"memory://lalora-{uuid.uuid4().hex}"
    try:
        builder = load_dataset_builder(**source, cache_dir=where)
        if files := _split_files(builder):
            return Dataset(_select(_text_tables(files, form), split)), True
        form.require_unused()
        tables = _prepared_tables(memory, where, builder)
        return Dataset(_select(tables, split), info=builder.info), False
    finally:
        if memory.exists(where):
            memory.rm(where, recursive=True)
