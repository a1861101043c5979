"""The step of shared noise for the audit: an attacker that is a client sees the sum of a round.

The victim's clipped sum becomes integers, n clients add their shares, the server removes the
components that nobody needs, and the attacker takes off its own share and those of c more. All of
it is the code that trains. Other clients have no examples: the attacker of the definition knows
theirs, and would take them off as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lalora_app.audit.step_attack import MICRO_BATCH, StepInputs
from lalora_app.privacy.accounting import epsilon
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.counted_releases import CountedReleases, counted_releases
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.private_step.step import private_integers
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.lattice import Constants, Lattice, Words, choose, mean, to_words
from lalora_app.shared_noise.run_constants import noise_multiplier
from lalora_app.shared_noise.seeded import Integers, component, new_seeds, share, without_excess
from lalora_app.shared_noise.shares import Cohort

Seeds = tuple[bytes, ...]
_VICTIM = 0


def check_own_noise(config: Config) -> None:
    """Check that single uploads may be seen, as the attack on a whole run sees them.

    Raises:
        ConfigError: for shared noise, with which only sums are seen.
    """
    if config.privacy.shared:
        raise ConfigError(
            'privacy.noise-share="sum" must be "own" for the audit of a whole run, which sees '
            "single uploads; --fast leaves it out"
        )


def shared_releases(config: Config) -> CountedReleases:
    """Return the releases of a run with shared noise: one sum per round, with the run's z."""
    privacy = config.privacy
    return counted_releases(
        Limit(privacy.epsilon, privacy.delta),
        rate=config.train.sampling_rate,
        rounds=config.num_server_rounds,
        steps=1,
        clip_norm=privacy.clip_norm,
        clipping=privacy.clipping,
        noise_multiplier=noise_multiplier(config),
    )


def opened_releases(plan: CountedReleases, cohort: Cohort) -> CountedReleases:
    """Return what the same rounds promise if the victim's uploads are opened: ε of z/√N."""
    opened = replace(plan.release, noise_multiplier=cohort.alone(plan.release.noise_multiplier))
    return replace(plan, release=opened, epsilon=epsilon([opened], plan.delta))


def tensors_of(flat: np.ndarray, parameters: Mapping[str, Any]) -> NoisedGrads:
    """Split (d,) entries into tensors, in the order of sorted names."""
    names = sorted(parameters)
    parts = torch.split(torch.from_numpy(flat), [parameters[n].numel() for n in names])
    return NoisedGrads(
        {n: part.reshape(parameters[n].shape) for n, part in zip(names, parts, strict=True)}
    )


@dataclass(frozen=True)
class SharedSum:
    """A private step whose release is a sum with shared noise, as an attacking client sees it.

    Attributes:
        run: δ, ε and number of the releases, for the choice of the integers.
        cohort: clients, threshold and the c clients that collude with the attacker.
        missing: D, clients whose upload is not in the sum; honest ones, which is the worst case.
        answered: number of missing clients for which seeds are revealed; None: D, as it must be.
        opened: whether the server opens the victim's upload, and sees it alone.
    """

    run: CountedReleases
    cohort: Cohort
    missing: int = 0
    answered: int | None = None
    opened: bool = False

    def lattice(self, inputs: StepInputs) -> Lattice:
        """Return the integers of the run, for the tensors and the noise of one step."""
        counted = inputs.reservation
        return choose(
            Constants(
                clip_norm=inputs.clip_norm,
                noise_multiplier=counted.noise_multiplier,
                sampling_rate=counted.sampling_rate,
                examples=len(inputs.data),
                entries=sum(p.numel() for p in inputs.model.engine.parameters.values()),
                releases=self.run.release.count,
                epsilon=self.run.epsilon,
                delta=self.run.delta,
                cohort=self.cohort,
            )
        )

    def __call__(self, inputs: StepInputs) -> NoisedGrads:
        """Return the mean gradient of one round, without the noise that the attacker knows."""
        lattice = self.lattice(inputs)
        seeds = self.seeds(inputs)
        upload = victims_part(inputs, lattice, seeds[_VICTIM])
        return self.seen(inputs, lattice, seeds, upload)

    def seeds(self, inputs: StepInputs) -> list[Seeds]:
        """Return the seeds of every client in the sum, the victim first, then the attackers."""
        clients = 1 if self.opened else self.cohort.clients - self.missing
        return [new_seeds(self.cohort, inputs.streams.noise.bytes) for _ in range(clients)]

    def seen(
        self, inputs: StepInputs, lattice: Lattice, seeds: Sequence[Seeds], upload: Integers
    ) -> NoisedGrads:
        """Return the decoded mean of the victim's upload and of all others, as the attacker has it.

        Args:
            inputs: the arguments of the step.
            lattice: the integers of the run.
            seeds: the seeds of every client in the sum.
            upload: (d,), the victim's integers with its noise.
        """
        total = upload + sum(share(own, lattice) for own in seeds[1:])
        rest = self._without_known(to_words(total, lattice.word), seeds, lattice)
        expected = lattice.constants.expected_batch
        return tensors_of(mean(rest, lattice, expected), inputs.model.engine.parameters)

    def _without_known(self, total: Words, seeds: Sequence[Seeds], lattice: Lattice) -> Words:
        """Return the sum less the superfluous components, and less the attackers' own noise."""
        answered = self.missing if self.answered is None else self.answered
        kept = self.cohort.needed(answered) + 1
        revealed = {i: own[kept] for i, own in enumerate(seeds) if kept < len(own)}
        rest = without_excess(total, revealed, answered, lattice)
        for own in seeds[1 : 2 + self.cohort.colluding]:
            for number, seed in enumerate(own[:kept]):
                rest -= to_words(component(seed, number, lattice), lattice.word)
        return rest


def victims_part(inputs: StepInputs, lattice: Lattice, seeds: Seeds) -> Integers:
    """Return the integers that the victim would upload."""
    return private_integers(
        inputs.model,
        inputs.data,
        reservation=inputs.reservation,
        lattice=lattice,
        seeds=seeds,
        micro_batch=MICRO_BATCH,
        sampling=inputs.streams.sampling,
        clipping=inputs.clipping,
    )


def shared_views(
    plan: CountedReleases, cohort: Cohort
) -> dict[str, tuple[SharedSum, CountedReleases]]:
    """Return the views of an attacker by name: its step, and the releases with their promise.

    Args:
        plan: the run's releases, one sum per round.
        cohort: clients, threshold and colluding clients of the run.

    Limit: without clients that may be missing there is one view of the sum.
    """
    found = {"sum": (SharedSum(plan, cohort), plan)}
    if cohort.most_missing:
        found["sum, most missing"] = (SharedSum(plan, cohort, cohort.most_missing), plan)
    opened = SharedSum(plan, cohort, opened=True)
    return {**found, "one upload alone": (opened, opened_releases(plan, cohort))}
