"""A comparison as data: which runs it is made of, and how each differs from the others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lalora_app.methods.compatibility import method_of
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, Scalar, as_float, parse

Flat = dict[str, Scalar]
MethodAtEpsilon = tuple[str, float]  # label and ε
Scales = Mapping[MethodAtEpsilon, float]  # factors of the learning rates
RATES = ("train.lr-a", "train.lr-b", "train.lr-head")


@dataclass(frozen=True)
class PlanEntry:
    """One line of the comparison: a method with what is particular to it, at some budgets."""

    label: str
    epsilons: tuple[float, ...]
    config: Mapping[str, Scalar]


@dataclass(frozen=True)
class Tuning:
    """The grid that every line's learning rates are tuned on, with data that no test touches.

    Attributes:
        grid: factors that multiply all learning rates.
        seeds: of the tuning runs, and of nothing else.
        test_fraction: of the training data, on which the factors are judged.
    """

    grid: tuple[float, ...]
    seeds: tuple[int, ...]
    test_fraction: float


@dataclass(frozen=True)
class PlanCell:
    """One run of a comparison.

    Attributes:
        label: of its line.
        epsilon: promised.
        folder: where its run goes, below the comparison's own folder.
        config: all keys and values of the run.
        scale: of its learning rates.
    """

    label: str
    epsilon: float
    folder: str
    config: Flat
    scale: float = 1.0

    @property
    def line(self) -> MethodAtEpsilon:
        """What the run is one seed of."""
        return self.label, self.epsilon


@dataclass(frozen=True)
class Plan:
    """A whole comparison: entries × their ε × seeds, after a tuning of each entry at each ε."""

    name: str
    nodes: int
    entries: tuple[PlanEntry, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None
    config: Mapping[str, Scalar]

    def _cell(
        self, entry: PlanEntry, epsilon: float, folder: str, scale: float, **keys: Any
    ) -> PlanCell:
        budget = {"privacy.epsilon": epsilon, "min-clients": self.nodes}
        own = {**self.config, **entry.config, **budget, **keys}
        rates = {key: _scaled(own[key], scale) for key in RATES}
        return PlanCell(entry.label, epsilon, folder, own | rates, scale)

    def _lines(self) -> Iterable[tuple[PlanEntry, float]]:
        return ((entry, epsilon) for entry in self.entries for epsilon in entry.epsilons)

    def tuning_cells(self) -> list[PlanCell]:
        """Return the runs that learning rates are chosen by; none without a grid."""
        tuning = self.tuning
        if tuning is None:
            return []
        return [
            self._tuning_cell(tuning, entry, epsilon, scale, seed)
            for entry, epsilon in self._lines()
            for scale in tuning.grid
            for seed in tuning.seeds
        ]

    def _tuning_cell(
        self, tuning: Tuning, entry: PlanEntry, epsilon: float, scale: float, seed: int
    ) -> PlanCell:
        folder = f"tuning/{slug(entry.label)}-eps{short(epsilon)}-x{short(scale)}-seed{seed}"
        rounds = {**self.config, **entry.config}["num-server-rounds"]
        keys = {
            "seed": seed,
            "data.test-split": "none",  # the test set plays no part
            "data.test-fraction": tuning.test_fraction,
            "evaluate-every": rounds,  # nobody looks at the curve
        }
        return self._cell(entry, epsilon, folder, scale, **keys)

    def cells(self, scales: Scales) -> list[PlanCell]:
        """Return the runs that are compared, seed by seed: cut short, it is a smaller comparison.

        Args:
            scales: of each line; 1 where there is none.
        """
        return [
            self._cell(
                entry,
                e,
                f"{slug(entry.label)}-eps{short(e)}-seed{seed}",
                scales.get((entry.label, e), 1.0),
                seed=seed,
            )
            for seed in self.seeds
            for entry, e in self._lines()
        ]

    def best(self, results: Sequence[tuple[PlanCell, float]]) -> dict[MethodAtEpsilon, float]:
        """Return the scale of each line whose tuning runs are the most accurate on average.

        Args:
            results: tuning cells with their accuracy; of equals, the smaller scale wins.
        """
        scores: dict[tuple[MethodAtEpsilon, float], list[float]] = {}
        for cell, accuracy in results:
            scores.setdefault((cell.line, cell.scale), []).append(accuracy)
        ranked = sorted(scores, key=lambda choice: (fmean(scores[choice]), -choice[1]))
        return dict(ranked)


def _scaled(rate: Any, scale: float) -> Any:
    """Return a rate times its scale; what is no number stays, and :func:`parse_cell` tells it."""
    return as_float(rate) * scale if type(rate) in (int, float) else rate


def slug(label: str) -> str:
    """Return a label as a folder's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in label)


def short(value: float) -> str:
    """Return a number as a part of a folder's name: short, and never another number's."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def parse_cell(cell: PlanCell) -> Config:
    """Return a run's config, checked.

    Raises:
        ConfigError: naming the run and what is wrong with it.
    """
    try:
        config = parse(cell.config)
        method_of(config)
    except ConfigError as error:
        raise ConfigError(f"{cell.folder}: {error}") from error
    return config
