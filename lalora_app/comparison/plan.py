"""The plan of a comparison: its entries, and the cells (single runs) that follow from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lalora_app.comparison.baselines import with_central_keys
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.table import METHODS
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, Scalar, as_float, parse

Flat = dict[str, Scalar]
MethodAtEpsilon = tuple[str, float]  # label of a plan entry, and ε
Scales = Mapping[MethodAtEpsilon, float]  # factor of all learning rates
_WHOLE = "train.lr-w"  # of methods that train whole weights
RATES = ("train.lr-a", "train.lr-b", _WHOLE, "train.lr-head")


@dataclass(frozen=True)
class PlanEntry:
    """One method of the comparison.

    Attributes:
        label: name of the entry in tables; different for each entry.
        epsilons: privacy budgets at which the method runs.
        config: keys and values of the run in which the entry differs from the plan's.
    """

    label: str
    epsilons: tuple[float, ...]
    config: Mapping[str, Scalar]


@dataclass(frozen=True)
class Tuning:
    """The tuning of the learning rates, on training examples held out from the test.

    Attributes:
        grid: factors that multiply all learning rates.
        seeds: seeds of the tuning runs only.
        test_fraction: share of the training split on which the factors are evaluated.
    """

    grid: tuple[float, ...]
    seeds: tuple[int, ...]
    test_fraction: float


@dataclass(frozen=True)
class PlanCell:
    """One run of a comparison.

    Attributes:
        label: label of the plan entry.
        epsilon: privacy budget of the run.
        folder: folder of the run, relative to the comparison's folder.
        config: all keys and values of the run.
        scale: factor of the learning rates, already applied in ``config``.
        defaults: values of the keys that a run finished before may lack, as they are newer.
    """

    label: str
    epsilon: float
    folder: str
    config: Flat
    scale: float = 1.0
    defaults: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def method_at_epsilon(self) -> MethodAtEpsilon:
        """Label and ε, shared by the runs that differ in seed only."""
        return self.label, self.epsilon


@dataclass(frozen=True)
class Plan:
    """A comparison: entries × their ε × seeds, after the tuning of each entry at each ε.

    Attributes:
        name: folder name of the comparison.
        nodes: number of simulated clients of every run.
        entries: methods to compare.
        seeds: seeds of the compared runs.
        tuning: tuning of the learning rates; None for no tuning.
        config: keys and values that all runs share.
        defaults: the app's own values of all keys.
        reference: label of the line to which the others are compared.
    """

    name: str
    nodes: int
    entries: tuple[PlanEntry, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None
    config: Mapping[str, Scalar]
    defaults: Mapping[str, Scalar]
    reference: str

    def _cell(
        self, entry: PlanEntry, epsilon: float, folder: str, scale: float, **keys: Any
    ) -> PlanCell:
        budget = {"privacy.epsilon": epsilon, "min-clients": self.nodes}
        own = with_central_keys({**self.config, **entry.config, **budget, **keys}, self.nodes)
        method = METHODS.get(str(own["method"]))
        keys_read = [key for key in RATES if key != _WHOLE or (method and method.whole)]
        rates = {key: _scaled(own[key], scale) for key in keys_read}
        return PlanCell(entry.label, epsilon, folder, own | rates, scale, self.defaults)

    def _entries_at_epsilons(self) -> Iterable[tuple[PlanEntry, float]]:
        return ((entry, epsilon) for entry in self.entries for epsilon in entry.epsilons)

    def tuning_cells(self) -> list[PlanCell]:
        """Return the runs of the tuning; none if there is no tuning."""
        tuning = self.tuning
        if tuning is None:
            return []
        return [
            self._tuning_cell(tuning, entry, epsilon, scale, seed)
            for entry, epsilon in self._entries_at_epsilons()
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
            "data.test-split": "none",  # the test split must not influence the choice
            "data.test-fraction": tuning.test_fraction,
            "evaluate-every": rounds,  # only the final accuracy is used
        }
        return self._cell(entry, epsilon, folder, scale, **keys)

    def cells(self, scales: Scales) -> list[PlanCell]:
        """Return the compared runs, ordered by seed: an interrupted comparison has fewer seeds.

        Args:
            scales: factors of the learning rates; 1 for an entry and ε without one.
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
            for entry, e in self._entries_at_epsilons()
        ]

    def best(self, results: Sequence[tuple[PlanCell, float]]) -> dict[MethodAtEpsilon, float]:
        """Return the scale with the highest mean accuracy for each entry and ε.

        Args:
            results: tuning cells with their accuracy; of equal means, the smaller scale wins.
        """
        scores: dict[tuple[MethodAtEpsilon, float], list[float]] = {}
        for cell, accuracy in results:
            scores.setdefault((cell.method_at_epsilon, cell.scale), []).append(accuracy)
        ranked = sorted(scores, key=lambda choice: (fmean(scores[choice]), -choice[1]))
        return dict(ranked)


def _scaled(rate: Any, scale: float) -> Any:
    """Return the scaled rate; other types are unchanged, for :func:`parse_cell` to report."""
    return as_float(rate) * scale if type(rate) in (int, float) else rate


def slug(label: str) -> str:
    """Return a label as a folder name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in label)


def short(value: float) -> str:
    """Return a number as part of a folder name: short, but different for different numbers."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def parse_cell(cell: PlanCell) -> Config:
    """Return the checked config of a cell.

    Raises:
        ConfigError: naming the cell's folder, the key, its value and the law that it breaks.
    """
    try:
        config = parse(cell.config)
        method_of(config)
    except ConfigError as error:
        raise ConfigError(f"{cell.folder}: {error}") from error
    return config
