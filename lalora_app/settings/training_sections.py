"""The tables ``privacy`` and ``train`` of the run config: keys, laws and meanings."""

import math
from dataclasses import dataclass

from lalora_app.settings.value_rules import (
    clip_norm,
    count,
    law,
    not_negative,
    one_of,
    positive,
)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The guarantee to every client over the whole run."""

    epsilon: float = law(
        "must be greater than 0 (inf: not private)",
        lambda v: v > 0,
        meaning="Privacy budget ε of every client over the whole run.",
    )
    delta: float = law(
        "must be in (0, 1)",
        lambda v: 0 < v < 1,
        meaning="Failure probability δ of the guarantee; below 1 / (examples of the client).",
    )
    clip_norm: float = clip_norm(
        meaning="Clip norm C: largest l2 norm of one example's gradient over all trained tensors "
        "together."
    )
    clipping: str = one_of(
        "flat",
        "automatic",
        meaning="Factor of an example's gradient g before the sum: `flat` is min(1, C/‖g‖), "
        "`automatic` is C/(‖g‖ + 0.01). The guarantee is the same "
        "([privacy](privacy.md#automatic-clipping)).",
    )
    noise: str = one_of(
        "secure",
        "seeded",
        meaning="Source of noise and of Poisson sampling: the operating system's randomness, or "
        "the run's seed. `seeded` makes a run repeatable and NOT private.",
    )
    noise_share: str = one_of(
        "own",
        "sum",
        meaning="Noise of an upload: `own` is the whole noise of every client; `sum` is a share, "
        "so that only the sum of all clients has the whole noise. `sum` needs "
        '`secure-aggregation="secagg+"` and other laws '
        "([secure aggregation](secure-aggregation.md#shared-noise)).",
    )
    colluding: int = law(
        "must not be negative",
        lambda v: v >= 0,
        meaning="Clients whose noise an attacker may know beside its own, with "
        '`privacy.noise-share="sum"`; each of them makes the noise of the others larger.',
    )
    head_share: float = law(
        "must be in (0, 1)",
        lambda v: 0 < v < 1,
        meaning="Share of `privacy.epsilon` that the release for `model.head=class-means` may use "
        "by itself; the noise of all later steps is planned with it.",
    )

    @property
    def shared(self) -> bool:
        """Whether only the sum of all uploads has the whole noise."""
        return self.noise_share == "sum"

    @property
    def private(self) -> bool:
        """Whether the guarantee holds: finite ε, and noise that nobody can repeat."""
        return self.noise == "secure" and math.isfinite(self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The local steps of one client."""

    local_steps: int = count(meaning="Training steps per client and round.")
    head_rounds: int = law(
        "must not be negative",
        lambda v: v >= 0,
        meaning="Rounds that train and send the head alone, before the method's first round "
        "([models](models.md#the-start-of-the-head)).",
    )
    batch_size: int = count(
        meaning="Expected number of examples per local step; every example is drawn with "
        "probability batch-size / (examples of the client)."
    )
    sampling_rate: float = law(
        "must be in [0, 1]",
        lambda v: 0 <= v <= 1,
        meaning="Probability of every example of every client to be drawn in a step, in place of "
        "`train.batch-size`; 0 leaves it to the batch size.",
    )
    union_size: int = law(
        "must not be negative",
        lambda v: v >= 0,
        meaning="Number of examples of all clients together, a public number or an estimate: the "
        'divisor of the sum with `privacy.noise-share="sum"`. 0 counts the training split of a '
        "simulation.",
    )
    micro_batch: int = count(
        meaning="Examples per forward and backward pass; affects memory and speed only."
    )
    optimizer: str = one_of("adamw", "sgd", meaning="Optimiser of the noised gradients.")
    lr_a: float = positive(meaning="Learning rate of the A factors.")
    lr_b: float = positive(meaning="Learning rate of the B factors.")
    lr_w: float = positive(
        meaning="Learning rate of the change of the whole weights, which the method `full` trains."
    )
    lr_head: float = positive(meaning="Learning rate of the head.")
    lr_decay: float = law(
        "must be in (0, 1]",
        lambda v: 0 < v <= 1,
        meaning="Factor that multiplies all learning rates after each round.",
    )
    schedule: str = one_of(
        "constant",
        "cosine",
        meaning="Factor of all learning rates over the steps of the run, after the warm-up: 1, or "
        "a cosine from 1 to 0 at the end of the run. `train.lr-decay` multiplies it.",
    )
    warm_up: float = law(
        "must be in [0, 1)",
        lambda v: 0 <= v < 1,
        meaning="Share of the run's steps at its start, in which the factor of all learning rates "
        "grows in equal parts to 1; the first step has one part, not 0.",
    )
    views: int = count(
        meaning="Number of random views (mirrored, shifted) of a drawn image in one step; their "
        "mean gradient is clipped. 1: the image itself; k views need k times the time and memory "
        "([privacy](privacy.md#views-of-an-image))."
    )
    momentum: float = law(
        "must be in [0, 1)", lambda v: 0 <= v < 1, meaning="Momentum of `sgd`; 0 for `adamw`."
    )
    weight_decay: float = not_negative(meaning="Weight decay of the optimiser.")

    @property
    def fewest(self) -> int:
        """Fewest examples that a client must have."""
        return 1 if self.sampling_rate else self.batch_size

    @property
    def batch_text(self) -> str:
        """The size of a step's batch as text for the log: a rate, or an expected number."""
        if self.sampling_rate:
            return f"{self.sampling_rate:g} of each client's examples"
        return f"{self.batch_size} expected examples"

    def rate(self, size: int) -> float:
        """Return q, the probability of each of a client's ``size`` examples to be drawn.

        Limit: 1 for fewer examples than a batch, which a client may have of one task.
        """
        return self.sampling_rate or min(1.0, self.batch_size / max(size, 1))
