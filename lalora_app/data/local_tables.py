"""Local files as tables in this process's memory: no copy of private data is written to a disk.

The readers of the `datasets` library decide on the types, as they do in `load_dataset`. That
function keeps its table in a cache folder, which a killed process leaves behind. Here the readers
write their table to fsspec's memory file system instead, and archives are read without unpacking.
"""

import uuid
from typing import Any

import fsspec
import pyarrow as pa


def _write_tables(where: str, source: dict[str, Any]) -> Any:
    """Write one table per split to a memory folder; return the builder that knows their types."""
    from datasets import StreamingDownloadManager, load_dataset_builder

    builder = load_dataset_builder(**source, cache_dir=where)
    manager = StreamingDownloadManager(
        base_path=builder.base_path, dataset_name=builder.dataset_name
    )
    builder.download_and_prepare(f"{where}/tables", dl_manager=manager)
    return builder


def _read_split(memory: Any, where: str, name: str) -> pa.Table:
    """Return the table of one split, which a large split has in several files."""
    single = memory.glob(f"{where}/tables/*-{name}.arrow")
    files = single or sorted(memory.glob(f"{where}/tables/*-{name}-?????-of-?????.arrow"))
    tables = []
    for file in files:
        with memory.open(file) as stream:
            tables.append(pa.ipc.open_stream(stream).read_all())
    return pa.concat_tables(tables)


def _select(memory: Any, where: str, builder: Any, split: str) -> pa.Table:
    """Return the rows that a split's name selects, such as ``train`` or ``train[:80%]``."""
    from datasets import ReadInstruction

    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    wanted = ReadInstruction.from_spec("+".join(sizes) if split == "all" else split)
    parts = wanted.to_absolute(sizes)
    tables = {part.splitname: _read_split(memory, where, part.splitname) for part in parts}
    return pa.concat_tables(
        tables[part.splitname].slice(part.from_, part.to - part.from_) for part in parts
    )


def load_in_memory(source: dict[str, Any], split: str) -> Any:
    """Return one split of local data as a `datasets.Dataset`, equal to that of `load_dataset`.

    Args:
        source: ``path`` and ``data_files`` as in `load_dataset`.
        split: name of the split, with an optional slice.

    Raises:
        Exception: of many kinds, if the data cannot be read or has no such split.

    Privacy: nothing is written to a disk, so nothing is left behind by a killed process.
    """
    from datasets import Dataset

    memory = fsspec.filesystem("memory")
    where = f"memory://lalora-{uuid.uuid4().hex}"
    try:
        builder = _write_tables(where, source)
        return Dataset(_select(memory, where, builder, split), info=builder.info)
    finally:
        if memory.exists(where):
            memory.rm(where, recursive=True)
