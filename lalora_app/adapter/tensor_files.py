"""Write arrays to safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lalora_app.adapter.factors import Array


def save_tensors(
    tensors: Mapping[str, Array], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, whatever their order in memory.

    ``save_file`` writes the memory of an array as it lies, but the shape of rows one by one, so it
    changes the content of a transposed array, or of columns that were picked, without an error.

    Args:
        tensors: arrays by their names.
        path: the file.
        metadata: texts by their names.
    """
    save_file({n: np.asarray(x, order="C") for n, x in tensors.items()}, path, metadata=metadata)
