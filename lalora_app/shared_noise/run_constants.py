"""The public constants of a run with shared noise, from its config."""

import hashlib
import math
from functools import lru_cache

from lalora_app.privacy.accounting import calibrate
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, Scalar, flatten
from lalora_app.shared_noise.lattice import Constants, Lattice, choose
from lalora_app.shared_noise.shares import Cohort


@lru_cache
def _calibrated(epsilon: float, delta: float, q: float, steps: int) -> float:
    return calibrate(epsilon, delta, sampling_rate=q, steps=steps)


def noise_multiplier(config: Config) -> float:
    """Return z of every sum of a run: calibrated for ``num-server-rounds`` releases.

    It depends on the config alone, and on nothing that a client has released: with less noise from
    one client, the others would have less than they count. A round that is attempted again is one
    of the ``num-server-rounds``.

    Raises:
        ConfigError: if no noise is enough for ``privacy.epsilon``.

    Limit: ε = inf gives 0.
    """
    privacy, q, steps = config.privacy, config.train.sampling_rate, config.num_server_rounds
    try:
        return _calibrated(privacy.epsilon, privacy.delta, q, steps)
    except ValueError as error:
        raise ConfigError(f"privacy.epsilon={privacy.epsilon}: {error}") from error


def public_constants(config: Config) -> dict[str, Scalar]:
    """Return the keys of a run that all its clients must have alike: all but the device."""
    return {key: value for key, value in flatten(config).items() if key != "model.device"}


def context_of(lattice: Lattice, digest: bytes, run: str, attempt: int, round_: int) -> bytes:
    """Return what the masks of a pair depend on beside the pair's secret, 32 bytes.

    Clients that disagree in any of it add masks that do not cancel, so the sum cannot be opened.

    Args:
        lattice: the integers of the round.
        digest: SHA-256 of the run's public constants.
        run: name of the run.
        attempt: number of the attempt.
        round_: number of the round.
    """
    numbers = (lattice.constants.entries, lattice.unit, lattice.word, lattice.noise_std)
    text = repr((digest.hex(), run, attempt, round_, *numbers))
    return hashlib.sha256(text.encode()).digest()


def lattice_of(config: Config, entries: int, cohort: Cohort, multiplier: float) -> Lattice:
    """Return the integers of one round.

    Args:
        config: the run's config.
        entries: d, the length of an upload of the round.
        cohort: the clients of the attempt.
        multiplier: z, from :func:`noise_multiplier`.

    Raises:
        ConfigError: if a sum needs integers that are too large.
    """
    privacy, train = config.privacy, config.train
    if math.isinf(privacy.clip_norm):
        raise ConfigError(
            'privacy.clip-norm=inf must be finite for privacy.noise-share="sum": integers have a '
            "largest value"
        )
    return choose(
        Constants(
            clip_norm=privacy.clip_norm,
            noise_multiplier=multiplier,
            sampling_rate=train.sampling_rate,
            examples=train.union_size,
            entries=entries,
            releases=config.num_server_rounds,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            cohort=cohort,
        )
    )
