"""The public constants of a run with shared noise, from its config."""

import math
from collections.abc import Sequence

from lalora_app.privacy.accounting import Release, calibrate
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.lattice import Constants, Lattice, choose
from lalora_app.shared_noise.shares import Cohort


def noise_multiplier(config: Config, past: Sequence[Release] = ()) -> float:
    """Return z of every sum of a run: calibrated for ``num-server-rounds`` releases.

    All clients of a run must have the same z, so it does not depend on what a client has released.
    A round that is attempted again is one of the ``num-server-rounds``.

    Args:
        config: the run's config.
        past: a client's releases of this run, whose z is taken if the rate is the same.

    Raises:
        ConfigError: if no noise is enough for ``privacy.epsilon``.

    Limit: ε = inf gives 0.
    """
    privacy, q = config.privacy, config.train.sampling_rate
    if past and past[-1].sampling_rate == q:
        return past[-1].noise_multiplier
    steps = config.num_server_rounds
    try:
        return calibrate(privacy.epsilon, privacy.delta, sampling_rate=q, steps=steps)
    except ValueError as error:
        raise ConfigError(f"privacy.epsilon={privacy.epsilon}: {error}") from error


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
