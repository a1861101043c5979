"""The end-to-end attack: which records is a client's change made of, and how surely?

The adversary of differential privacy knows every other record, so it knows the gradient of every
record that may have been drawn. Under SGD a tensor's change is a known linear map of the noised
sums, ``-lr·Σ_k F(Σ_i c_ki·g_i(θ_k) + noise)/(q·n)``: least squares over all records gives how
often each was drawn. The parameters θ_k of the steps are not known; all are taken to lie at one
point between what the client was sent and what it sent back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter.factors import Adapter, Kind, active_names, kind
from lalora_app.audit.planted_federation import Federation, Sent
from lalora_app.client.local_round import learning_rates
from lalora_app.data.encoding import Encoded
from lalora_app.methods.method import Method
from lalora_app.methods.optimizers import configured_optimizer
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.private_step.mechanism import clip_scales
from lalora_app.private_step.step import noise_std_of
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

_POINT = np.float32(0.25)  # of the way from a round's start to its end: gradients are taken there
BATCH = 32
_DRIFT = 1e-3  # of a gradient's mean square: what that point does not tell of the steps
_LEAST_SPREAD = 0.1  # the errors of a linear model are no Gaussian's: nothing is surer than this
_FEWEST = 1e-6  # of a record's share that shows; below it, nothing is said

GradientRows = dict[Kind, np.ndarray]  # by kind of tensor: (records, entries), float32


@dataclass(frozen=True)
class DrawEstimates:
    """How often each canary was drawn, as far as a kind of tensor tells.

    Attributes:
        x: (canaries,), 1 for once; 0 where nothing shows.
        spread: (canaries,), its deviation for a canary that was not drawn.
        rate: the chance of a member to be drawn at all.
    """

    x: np.ndarray
    spread: np.ndarray
    rate: float


def check(config: Config, method: Method) -> None:
    """Check that a client's change is the linear map that the attack undoes.

    Raises:
        ConfigError: for any optimiser but plain SGD.
    """
    train = config.train
    if (
        method.optimizer is not configured_optimizer
        or train.optimizer != "sgd"
        or train.momentum > 0
    ):
        raise ConfigError(
            f'train.optimizer="{train.optimizer}", train.momentum={train.momentum} and method '
            f"{config.method} must be plain SGD for the audit of a whole run; --fast leaves it out"
        )


def in_own_order(records: Encoded, found: Sequence[np.ndarray]) -> np.ndarray:
    """Return (records, …) in the records' order, from what was found batch by batch."""
    places = np.argsort(records.ordered(range(len(records))))
    whole: np.ndarray = np.concatenate(found)[places]
    return whole


def _together(federation: Federation, t: int) -> dict[Kind, frozenset[Kind]]:
    """Return, for each kind that round ``t`` trains, the kinds that it is clipped with."""
    names, steps = federation.state.adapter, federation.config.train.local_steps
    found: dict[Kind, frozenset[Kind]] = {}
    for k in range(steps):
        active = frozenset(kind(n) for n in active_names(names, federation.method.trains(t, k)))
        for which in active:
            found.setdefault(which, active)
    return found


def _clipped(
    parts: Mapping[str, Tensor], together: Mapping[Kind, frozenset[Kind]], clip_norm: float
) -> dict[str, Tensor]:
    """Return each record's gradients as a step sums them: clipped over the kinds of that step."""
    squares: dict[Kind, Tensor] = {}
    for name, part in parts.items():
        own = part.flatten(1).square().sum(dim=1)
        squares[kind(name)] = squares.get(kind(name), torch.zeros_like(own)) + own
    scales = {
        which: clip_scales(torch.stack([squares[w] for w in active]).sum(0).sqrt(), clip_norm)
        for which, active in together.items()
    }
    return {
        name: part * scales[kind(name)].reshape(-1, *[1] * (part.ndim - 1))
        for name, part in parts.items()
        if kind(name) in scales
    }


def _filtered(parts: Mapping[str, Tensor], method: Method) -> GradientRows:
    """Return (records, entries) by kind, behind the method's filter: a linear map."""
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


def _gradients(federation: Federation, sent: Sent) -> GradientRows:
    """Return every record's gradient on the way through a round, as a step uses it."""
    backbone, engine = federation.backbone, federation.backbone.engine
    backbone.load(_underway(sent), sent.drift)
    engine.activate(frozenset(engine.parameters))
    together, found = _together(federation, sent.t), []
    records = federation.records
    for batch in records.batches(BATCH):
        grads = engine.gradients(partial(backbone.losses, batch), len(batch.labels))
        clipped = _clipped(grads.dense(), together, federation.config.privacy.clip_norm)
        found.append(_filtered(clipped, federation.method))
    return {which: in_own_order(records, [rows[which] for rows in found]) for which in found[0]}


def _flat(tensors: Mapping[str, np.ndarray], which: Kind) -> np.ndarray:
    return np.concatenate([x.reshape(-1) for name, x in tensors.items() if kind(name) == which])


def _noise_left(method: Method, shapes: Adapter, which: Kind) -> float:
    """Return the variance that the method's filter leaves of white noise of variance 1."""
    rng = seeded(0, "audit filter")
    white = {n: torch.from_numpy(rng.standard_normal(x.shape)) for n, x in shapes.items()}
    left = method.postprocess(NoisedGrads(white))
    return float(_flat({n: x.numpy() for n, x in left.items()}, which).var())


def solved(
    rows: np.ndarray, wanted: np.ndarray, *, prior: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (records,): how often each was drawn, and how much of one draw shows.

    The mean of the posterior where every count has mean and variance ``prior``, and ``wanted`` is
    the sum of the rows by their counts, and noise. Limit: rows of zeros show nothing.

    Args:
        rows: (records, entries), gradients.
        wanted: (entries,).
        prior: expected number of draws.
        noise: variance of an entry of ``wanted``; 0: a small ridge stands for the model's error.
    """
    gram = (rows @ rows.T).astype(np.float64)
    ridge = noise / prior + _DRIFT * float(np.trace(gram)) / len(gram)
    if ridge == 0:  # A has no gradient while B is zero
        return np.full(len(gram), prior), np.zeros(len(gram))
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    counts = prior + inverse @ ((rows @ wanted).astype(np.float64) - prior * gram.sum(axis=1))
    return counts, 1 - ridge * np.diag(inverse)


def draw_estimates(federation: Federation, sent: Sent, canaries: int) -> dict[Kind, DrawEstimates]:
    """Return what each kind of tensor of a round tells of the canaries, the last of the records."""
    config, method = federation.config, federation.method
    rows = _gradients(federation, sent)
    q, found = federation.release.sampling_rate, {}
    noise = noise_std_of(Reservation(federation.release), config.privacy.clip_norm) ** 2
    rates = learning_rates(config.train, config.rule, sent.t)
    for which in list(rows):
        steps = len(sent.steps[which])
        counts, shows = solved(
            rows.pop(which),
            -_flat(sent.change, which) * (config.train.batch_size / rates[which]),
            prior=steps * q,
            noise=steps * noise * _noise_left(method, sent.start, which),
        )
        x, spread = standardised(counts[-canaries:], shows[-canaries:], steps * q)
        found[which] = DrawEstimates(x, spread, 1 - (1 - q) ** steps)
    return found


def _underway(sent: Sent) -> Adapter:
    """Return the adapter a part of the way to what the client sent; what did not travel rests."""
    return {
        name: start + _POINT * sent.change[name] if kind(name) in sent.kinds else start
        for name, start in sent.start.items()
    }


def standardised(
    counts: np.ndarray, shows: np.ndarray, prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return what is 1 for a canary drawn once and 0 for most others, and its deviation for these.

    The deviation is the posterior's own, or the one that is seen, whichever is larger.
    """
    clear = np.maximum(shows, _FEWEST)
    x = (counts - prior) / clear
    x -= np.median(x)
    seen = 1.4826 * np.median(np.abs(x))
    return x, np.maximum(np.sqrt(prior * (1 - clear) / clear), max(seen, _LEAST_SPREAD))
