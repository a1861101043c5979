"""The whole run config: the keys of no table, and one table per section."""

from dataclasses import dataclass

from lalora_app.settings.method_numbers import MethodNumbers
from lalora_app.settings.names import CLASS_MEANS
from lalora_app.settings.sections import Data, Lora, Model
from lalora_app.settings.server_section import Server
from lalora_app.settings.training_sections import Privacy, Train
from lalora_app.settings.value_rules import (
    count,
    law,
    non_empty,
    one_of,
    path,
    path_or_none,
    positive,
    switch,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The checked settings of one run."""

    method: str = non_empty(
        meaning="Federated LoRA method, one name of `lalora methods`; see [methods.md](methods.md)."
    )
    num_server_rounds: int = count(meaning="Number of rounds, failed ones included.")
    evaluate_every: int = count(
        meaning="Rounds between two evaluations on the test split; the last round is always "
        "evaluated."
    )
    fraction_train: float = law(
        "must be in (0, 1]",
        lambda v: 0 < v <= 1,
        meaning="Share of the clients that train in each round.",
    )
    min_clients: int = count(meaning="Number of SuperNodes to wait for before the first round.")
    min_replies: int = count(meaning="Valid replies that a round needs; with fewer it fails.")
    round_timeout: float = positive(meaning="Seconds to wait for the replies of one round.")
    node_timeout: float = positive(meaning="Seconds to wait for `min-clients` SuperNodes.")
    weighting: str = one_of(
        "uniform",
        "public-size",
        meaning="Weights of the clients in the mean: equal, or their number of examples where "
        "each client has declared it public.",
    )
    robust: str = one_of(
        "none",
        "median",
        "trimmed-mean",
        "krum",
        meaning="Robust aggregation in place of the mean, against clients that send wrong numbers.",
    )
    secure_aggregation: str = one_of(
        "none",
        "secagg+",
        meaning="Masks that cancel in the sum, so that the server sees sums of uploads only; "
        "see [secure-aggregation.md](secure-aggregation.md).",
    )
    suspects: int = law(
        "must not be negative",
        lambda v: v >= 0,
        meaning="Number of clients with wrong numbers that `trimmed-mean` or `krum` tolerates.",
    )
    seed: int = law(
        "must be from 0 to 9223372036854775807",
        lambda v: 0 <= v < 2**63,
        meaning="Seed of the partition, the initial adapter and the selection of clients. Noise "
        'and Poisson sampling depend on it only with `privacy.noise="seeded"`.',
    )
    central: bool = switch(
        meaning="In simulation, one client holds the whole training split and trains alone, with "
        "`train.batch-size` examples per step; the baseline of what the federation costs "
        "([comparisons](comparisons.md#baselines))."
    )
    output: str = path(meaning="Folder of all results; each run makes its own folder there.")
    resume_from: str = path_or_none(
        meaning="Folder of an interrupted run to continue; `none` starts a new run."
    )
    compare: str = path_or_none(
        meaning="Plan file that `lalora compare` writes: many runs inside one Flower run; `none` "
        "for a single run."
    )
    model: Model
    lora: Lora
    data: Data
    privacy: Privacy
    train: Train
    rule: MethodNumbers
    server: Server

    def is_last(self, attempt: int) -> bool:
        """Tell whether the run ends with this attempt (from 1)."""
        return attempt >= self.num_server_rounds

    @property
    def head_rounds(self) -> int:
        """Number of rounds of the head alone, before the method's first round."""
        return self.train.head_rounds + (self.model.head == CLASS_MEANS)

    def sums_classes(self, t: int) -> bool:
        """Tell whether clients release class sums in round ``t`` (from 1), and take no step."""
        return t == 1 and self.model.head == CLASS_MEANS

    @property
    def has_tasks(self) -> bool:
        """Whether each block of rounds has examples of its own."""
        return self.data.tasks > 1

    def open_task(self, t: int) -> int:
        """Return the number of the task (from 0) whose examples train in round ``t`` (from 1)."""
        return (t - 1) * self.data.tasks // self.num_server_rounds

    def rounds_of_task(self, t: int) -> int:
        """Return the number of rounds from ``t`` to the end of its block, with round ``t``."""
        last = -(-(self.open_task(t) + 1) * self.num_server_rounds // self.data.tasks)
        return last - t + 1

    def is_evaluated(self, attempt: int) -> bool:
        """Tell whether the test split is evaluated after this attempt (0: before the first)."""
        return attempt % self.evaluate_every == 0 or self.is_last(attempt)
