"""Estimate from a client's change how often each of its records was drawn.

The adversary of differential privacy knows every other record, so it knows the gradient of every
record that may have been drawn. Under SGD a tensor's change is a known linear map of the noised
sums, ``-lr·Σ_k F(Σ_i c_ki·g_i(θ_k) + noise)/(q·n)``. Least squares over all records, with the
prior of Poisson sampling, gives how often each was drawn. The parameters θ_k of the steps are not
known; all gradients are taken at one point between the received adapter and the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter.factors import Adapter, Kind, active_names, kind
from lalora_app.audit.planted_federation import Federation, VictimRound
from lalora_app.audit.shared_step import check_own_noise
from lalora_app.data.encoding import Encoded
from lalora_app.methods.learning_rates import learning_rates, rate_factor
from lalora_app.methods.method import Method
from lalora_app.methods.optimizers import configured_optimizer
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.private_step.mechanism import CLIPPINGS
from lalora_app.private_step.step import noise_std_of
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, Privacy

_POINT = np.float32(0.25)  # share of the way from a round's start to its end, for the gradients
BATCH = 32
_MODEL_ERROR = (
    1e-3  # variance of the error due to this point, relative to the gradients' mean squared norm
)
_LEAST_SPREAD = 0.1  # lower limit of an estimate's deviation: the model's errors are not Gaussian
_LEAST_SHOWN = 1e-6  # lower limit of an estimate's expected change per draw

GradientRows = dict[Kind, np.ndarray]  # by kind of tensor: (records, entries), float32


@dataclass(frozen=True)
class DrawEstimates:
    """The estimated draws of each canary in one round, from one kind of tensor.

    Attributes:
        x: (canaries,), about 1 for a canary that was drawn once and 0 for most others; 0 also if
            the tensor shows nothing about it.
        spread: (canaries,), standard deviation of ``x`` for a canary that was not drawn.
        rate: chance of a member to be drawn at all.
    """

    x: np.ndarray
    spread: np.ndarray
    rate: float


def check_linear(config: Config, method: Method) -> None:
    """Check that a client's change is the linear map that the attack inverts.

    Raises:
        ConfigError: for any optimiser but plain SGD, for random views, which the attack does not
            know, for ranks that shrink, and for shared noise.
    """
    check_own_noise(config)
    train = config.train
    if train.views > 1:
        raise ConfigError(
            f"train.views={train.views} must be 1 for the audit of a whole run; --fast leaves it "
            "out"
        )
    if (
        method.optimizer is not configured_optimizer
        or train.optimizer != "sgd"
        or train.momentum > 0
    ):
        raise ConfigError(
            f'train.optimizer="{train.optimizer}", train.momentum={train.momentum} and method '
            f"{config.method} must be plain SGD for the audit of a whole run; --fast leaves it out"
        )
    if method.next_rank is not None and config.rule.rank_decay < 1:
        raise ConfigError(
            f"rule.rank-decay={config.rule.rank_decay} must be 1 for the audit of a whole run, "
            "whose clients keep their ranks; --fast leaves it out"
        )


def in_own_order(records: Encoded, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return (records, …) in the records' order, from one array per batch of ``records``."""
    places = np.argsort(records.ordered(range(len(records))))
    whole: np.ndarray = np.concatenate(parts)[places]
    return whole


def _clipped_together(federation: Federation, t: int) -> dict[Kind, frozenset[Kind]]:
    """Return, for each kind that round ``t`` trains, all kinds under the same clip."""
    names, steps = federation.state.adapter, federation.config.train.local_steps
    together: dict[Kind, frozenset[Kind]] = {}
    for k in range(steps):
        active = frozenset(kind(n) for n in active_names(names, federation.method.trains(t, k)))
        for which in active:
            together.setdefault(which, active)
    return together


def _clipped(
    parts: Mapping[str, Tensor], together: Mapping[Kind, frozenset[Kind]], privacy: Privacy
) -> dict[str, Tensor]:
    """Return each record's gradients as a step sums them: clipped over the kinds of that step."""
    squares: dict[Kind, Tensor] = {}
    for name, part in parts.items():
        own = part.flatten(1).square().sum(dim=1)
        squares[kind(name)] = squares.get(kind(name), torch.zeros_like(own)) + own
    norms = {
        which: torch.stack([squares[w] for w in active]).sum(0).sqrt()
        for which, active in together.items()
    }
    scales_of, clip_norm = CLIPPINGS[privacy.clipping], privacy.clip_norm
    scales = {which: scales_of(norm, clip_norm) for which, norm in norms.items()}
    return {
        name: part * scales[kind(name)].reshape(-1, *[1] * (part.ndim - 1))
        for name, part in parts.items()
        if kind(name) in scales
    }


def _filtered(parts: Mapping[str, Tensor], method: Method) -> GradientRows:
    """Return (records, entries) by kind, after the method's filter, which is a linear map."""
    count = len(next(iter(parts.values())))
    rows: dict[Kind, list[Tensor]] = {}
    for i in range(count):
        own = method.postprocess(NoisedGrads({name: part[i] for name, part in parts.items()}))
        flat: dict[Kind, list[Tensor]] = {}
        for name in parts:
            flat.setdefault(kind(name), []).append(own[name].reshape(-1))
        for which, pieces in flat.items():
            rows.setdefault(which, []).append(torch.cat(pieces))
    return {which: torch.stack(lines).cpu().numpy() for which, lines in rows.items()}


def _gradients(federation: Federation, seen: VictimRound) -> GradientRows:
    """Return every record's gradient between start and end of a round, as a step uses it."""
    model, records = federation.victim.model, federation.victim.data.inner
    model.load(_intermediate(seen), seen.drift)
    model.engine.activate(frozenset(model.engine.parameters))
    together, privacy = _clipped_together(federation, seen.t), federation.config.privacy
    parts = []
    for batch in records.batches(BATCH):
        grads = model.engine.gradients(partial(model.losses, batch), len(batch.labels))
        clipped = _clipped(grads.dense(), together, privacy)
        parts.append(_filtered(clipped, federation.method))
    return {which: in_own_order(records, [rows[which] for rows in parts]) for which in parts[0]}


def _flat(tensors: Mapping[str, np.ndarray], which: Kind) -> np.ndarray:
    return np.concatenate([x.reshape(-1) for name, x in tensors.items() if kind(name) == which])


def _noise_left(method: Method, shapes: Adapter, which: Kind) -> float:
    """Return the variance of white noise of variance 1 after the method's filter."""
    rng = seeded(0, "audit filter")
    white = {n: torch.from_numpy(rng.standard_normal(x.shape)) for n, x in shapes.items()}
    left = method.postprocess(NoisedGrads(white))
    return float(_flat({n: x.numpy() for n, x in left.items()}, which).var())


def posterior_counts(
    rows: np.ndarray, total: np.ndarray, *, prior: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return each record's estimated number of draws, and its change per draw: two (records,).

    The model: ``total`` is noise plus the sum over all records of number of draws · row, and every
    number of draws has mean and variance ``prior``. The estimate is the mean of the posterior; one
    more draw changes it by 0 to 1. Limit: rows of zeros give the prior, and a change of 0.

    Args:
        rows: (records, entries), gradients.
        total: (entries,), the noised sum.
        prior: expected number of draws.
        noise: variance of the noise per entry of ``total``; 0 leaves the error of the model only.
    """
    gram = (rows @ rows.T).astype(np.float64)
    ridge = noise / prior + _MODEL_ERROR * float(np.trace(gram)) / len(gram)
    if ridge == 0:  # A has no gradient while B is zero
        return np.full(len(gram), prior), np.zeros(len(gram))
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    counts = prior + inverse @ ((rows @ total).astype(np.float64) - prior * gram.sum(axis=1))
    return counts, 1 - ridge * np.diag(inverse)


def _mean_rates(config: Config, t: int) -> dict[Kind, float]:
    """Return the mean learning rate of each kind over the steps of round ``t``."""
    train, k = config.train, config.train.local_steps
    steps = range((t - 1) * k, t * k)
    factor = fmean(rate_factor(train, step, config.num_server_rounds * k) for step in steps)
    return {which: factor * rate for which, rate in learning_rates(train, config.rule, t).items()}


def draw_estimates(
    federation: Federation, seen: VictimRound, canaries: int
) -> dict[Kind, DrawEstimates]:
    """Return the estimated draws of the canaries by kind of tensor.

    Args:
        federation: the federation after the round.
        seen: the victim's part in the round.
        canaries: number of canaries, which are the last records.
    """
    config, method = federation.config, federation.method
    rows, estimates = _gradients(federation, seen), {}
    q = seen.reservation.sampling_rate
    noise = noise_std_of(seen.reservation, config.privacy.clip_norm) ** 2
    rates = _mean_rates(config, seen.t)
    for which in list(rows):
        steps = len(seen.steps[which])
        counts, shown = posterior_counts(
            rows.pop(which),
            -_flat(seen.change, which) * (config.train.batch_size / rates[which]),
            prior=steps * q,
            noise=steps * noise * _noise_left(method, seen.received, which),
        )
        x, spread = standardised(counts[-canaries:], shown[-canaries:], steps * q)
        estimates[which] = DrawEstimates(x, spread, 1 - (1 - q) ** steps)
    return estimates


def _intermediate(seen: VictimRound) -> Adapter:
    """Return the adapter between start and end for the kinds that travelled, others as received."""
    return {
        name: start + _POINT * seen.change[name] if kind(name) in seen.sent else start
        for name, start in seen.received.items()
    }


def standardised(
    counts: np.ndarray, shown: np.ndarray, prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the canaries' estimated draws, and their standard deviation: two (canaries,).

    The draws are shifted to a median of 0 and scaled: about 1 for a canary that was drawn once. The
    standard deviation is that of a canary that was not drawn: the larger one of the posterior's and
    the measured deviation.

    Args:
        counts: (canaries,), estimated numbers of draws.
        shown: (canaries,), expected change of ``counts`` per draw.
        prior: expected number of draws.
    """
    share = np.maximum(shown, _LEAST_SHOWN)
    x = (counts - prior) / share
    x -= np.median(x)
    measured = 1.4826 * np.median(np.abs(x))
    return x, np.maximum(np.sqrt(prior * (1 - share) / share), max(measured, _LEAST_SPREAD))
