"""The settings of all parts of the GPU measurement, and the units into which a part is cut."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # one measurement; ``ok`` False: it failed, True: it is right


@dataclass(frozen=True)
class Settings:
    """The options of `benchmarks/gpu.py`.

    Attributes:
        out: the folder of the results.
        device: "cuda" or "cpu".
        quick: whether shapes are tiny, to try the command itself.
        assets: a folder with ``models/minilm-l6-h384`` and ``data/sst2``; None: without the study.
    """

    out: Path
    device: str = "cuda"
    quick: bool = False
    assets: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Unit:
    """A piece of a part's work.

    Attributes:
        name: what is measured.
        rows: measures it.
    """

    name: str
    rows: Callable[[], Iterable[Row]]
