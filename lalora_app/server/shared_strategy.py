"""The Strategy of shared noise: clients send gradients, and only their sum has the whole noise."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lalora_app.adapter.factors import Adapter, factors_text, kind, select
from lalora_app.methods.learning_rates import learning_rates, rate_factor
from lalora_app.methods.method import Method
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.results.run_folder import ResumePoint, RunFolder
from lalora_app.secagg.messages import MASKED
from lalora_app.secagg.peers import digest_of
from lalora_app.server.attempt import failed_attempt
from lalora_app.server.secure_strategy import SecureFederatedLora
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.lattice import Lattice, Words, mean
from lalora_app.shared_noise.run_constants import (
    context_of,
    lattice_of,
    noise_multiplier,
    public_constants,
)
from lalora_app.shared_noise.seeded import without_excess
from lalora_app.shared_noise.shares import Cohort

_log = logging.getLogger("flwr")


def with_union_size(config: Config, size: int) -> Config:
    """Return a config of shared noise with ``train.union-size``, or with ``size`` in its place.

    Args:
        config: the run's config.
        size: the number of examples of the training split that the server can read.

    Limit: with own noise the config is returned unchanged.
    """
    if not config.privacy.shared or config.train.union_size:
        return config
    return replace(config, train=replace(config.train, union_size=size))


def require_union_size(config: Config, simulated: bool) -> None:
    """Check that the number of examples is given where the server does not have them.

    Raises:
        ConfigError: if the clients have data of their own and ``train.union-size`` is 0.
    """
    if config.privacy.shared and not simulated and config.train.union_size == 0:
        raise ConfigError(
            "train.union-size=0 must be the number of examples of all sites together, or an "
            'estimate, for privacy.noise-share="sum": it divides the sum of the gradients'
        )


def after_interruption(
    config: Config, method: Method, point: ResumePoint, folder: RunFolder
) -> ResumePoint:
    """Return where a resumed run with shared noise goes on: behind the interrupted attempt.

    Clients may have released a sum in that attempt, and z is meant for ``num-server-rounds`` of
    them. So the attempt is not repeated, it counts as failed.

    Args:
        config: the run's config.
        method: the run's method.
        point: the state after the last attempt that is known to be whole.
        folder: the run's folder, in which the failed attempt is written at once.

    Limit: unchanged with own noise, whose repeated attempts get more noise, and at the end.
    """
    state = point.state
    if not config.privacy.shared or config.is_last(state.attempts):
        return point
    sent = method.sent(state.round + 1, last=config.is_last(state.attempts + 1))
    failed = failed_attempt(state.round + 1, factors_text(sent), config.privacy.epsilon)
    row = {"attempt": state.attempts + 1, **asdict(failed)}
    row["elapsed"] = point.rows[-1]["elapsed"] if point.rows else 0.0
    found = replace(point, state=state.failed(), rows=[*point.rows, row])
    folder.write_history(found.rows)
    folder.checkpoint(found.state)
    return found


def _by_name(flat: NDArray[np.float64], like: Adapter) -> NoisedGrads:
    """Split a flat gradient into tensors, sorted by name, with the shapes of ``like``."""
    parts = np.split(flat, np.cumsum([like[name].size for name in sorted(like)])[:-1])
    pairs = zip(sorted(like), parts, strict=True)
    return NoisedGrads({n: torch.from_numpy(part.reshape(like[n].shape)) for n, part in pairs})


def gradient_step(
    config: Config, method: Method, tensors: Adapter, gradient: NDArray[np.float64], t: int
) -> Adapter:
    """Return the tensors that travelled, after one step of SGD along the mean gradient.

    X - η_t·f_t·filter(ĝ), with the learning rate of the tensor's kind in round t, and the factor of
    the schedule. It is what one client with the data of all would upload after its one step; the
    table ``server`` of the config then replaces plain SGD by momentum, Adam or an average.

    Args:
        config: the run's config.
        method: the method in its form of one step.
        tensors: the global tensors that travel in round t.
        gradient: (d,), the mean gradient, in the order of sorted names.
        t: the round, from 1.

    Returns:
        The tensors in float32; computed in float64.

    Privacy: post-processing of a noised sum; no extra cost.
    """
    rates = learning_rates(config.train, config.rule, t)
    factor = rate_factor(config.train, t - 1, config.num_server_rounds)
    filtered = method.postprocess(_by_name(gradient, tensors))
    return {
        name: (tensors[name] - rates[kind(name)] * factor * grad.numpy()).astype(np.float32)
        for name, grad in filtered.items()
    }


@dataclass
class SharedNoiseLora(SecureFederatedLora):
    """Takes one step per round along the mean gradient of all clients.

    The mean is γ·Σ/(q·n), with n = ``train.union-size``.
    """

    def summary(self) -> None:
        """Log the run, and the integers and the noise of its first round."""
        super().summary()
        cohort = Cohort.of(len(self.clients.nodes), self.config.privacy.colluding)
        lattice = self._lattice(cohort)
        _log.info(
            "LaLoRA shared noise: %d clients, at least %d in a sum, %d colluding; noise multiplier "
            "%.4g in a sum, words of %d bits, delta slack %.1g",
            *(cohort.clients, cohort.threshold, cohort.colluding),
            *(lattice.constants.noise_multiplier, lattice.word, lattice.delta_slack),
        )
        if self.clients.simulated and math.isfinite(self.config.privacy.epsilon):
            _log.warning(
                "LaLoRA shared noise in a simulation hides nothing: one process draws the noise of "
                "all clients and could read every upload"
            )

    def _lattice(self, cohort: Cohort) -> Lattice:
        entries = sum(array.size for array in self._travelling().values())
        return lattice_of(self.config, entries, cohort, noise_multiplier(self.config))

    def _epsilon_alone(self) -> float | None:
        """Return ε of all uploads of the run, each opened: of N releases with z/√(n - 1 - c)."""
        cohort = Cohort.of(len(self.clients.nodes), self.config.privacy.colluding)
        alone, privacy = cohort.alone(noise_multiplier(self.config)), self.config.privacy
        count = self.config.num_server_rounds
        return epsilon([Release(self.config.train.sampling_rate, alone, count)], privacy.delta)

    def _terms(self) -> dict[str, Any]:
        config = self.config
        digest = digest_of(public_constants(config))
        return {"colluding": config.privacy.colluding, "digest": digest}

    def _travelling(self) -> Adapter:
        return select(self.state.adapter, self._synced())

    def _expected(self, client: int) -> Mapping[str, np.ndarray]:
        lattice = self._lattice(self._cohort())
        words = np.uint32 if lattice.word == 32 else np.uint64
        return {MASKED: np.zeros(lattice.constants.entries, words)}

    def _cohort(self) -> Cohort:
        return Cohort.of(len(self._session.mask_keys), self.config.privacy.colluding)

    def _unmasked(self, vectors: Mapping[int, Words]) -> Adapter:
        """Return the global tensors after the round's step."""
        cohort, digest, t = self._cohort(), self._session.digest, self.state.round + 1
        lattice, missing = self._lattice(cohort), cohort.clients - len(vectors)
        context = context_of(lattice, digest, self.run, self.state.attempts + 1, t)
        total = self._session.unmasked_sum(vectors, context)
        rest = without_excess(total, self._session.noise_seeds(), missing, lattice)
        gradient = mean(rest, lattice, lattice.constants.expected_batch)
        return gradient_step(self.config, self.method, self._travelling(), gradient, t)
