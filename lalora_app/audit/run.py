"""The end-to-end audit: who was in one client's data, by what that client sent?

Half of the mislabelled canaries, by a coin each, are in the data of one client. The attacker is
the server: it sees what that client sends in each round, and the final adapter.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from lalora_app.adapter import Adapter, Kind, kind
from lalora_app.audit.estimators import Guesses, one_run
from lalora_app.audit.federation import Federation, Sent, mislabelled
from lalora_app.audit.step import guessed
from lalora_app.backbone import Backbone
from lalora_app.config import Config
from lalora_app.data import Examples
from lalora_app.encoding import Batch, Encoded
from lalora_app.privacy.mechanism import clip_scales
from lalora_app.privacy.randomness import seeded

_SHARE = 0.25  # of the canaries guessed on either side, fixed before anything is seen
_BATCH = 32
_RIDGE = 0.01  # of the mean squared norm of the canaries' gradients


@dataclass(frozen=True)
class Part:
    """What one kind of tensor gave away in one round.

    Attributes:
        t: the round.
        kind: A, B or head.
        sent: whether it travelled.
        auc: of the membership scores; 0.5: nothing is learnt.
    """

    t: int
    kind: Kind
    sent: bool
    auc: float


@dataclass(frozen=True)
class RunBound:
    """What a whole run gives away about its canaries.

    Attributes:
        epsilon: lower bound that assumes (ε, δ)-DP alone, from all that travelled.
        ledger: the victim's ε by the accountant.
        guesses: behind the bound.
        auc: of the scores from all that travelled.
        auc_everything: had every tensor travelled in every round.
        auc_final: from the final adapter alone, by the canaries' losses.
        parts: by round and kind.
    """

    epsilon: float
    ledger: float
    guesses: Guesses
    auc: float
    auc_everything: float
    auc_final: float
    parts: tuple[Part, ...]


def auc(scores: np.ndarray, members: np.ndarray) -> float:
    """Return the chance that a member scores higher than another; 0.5: nothing is learnt."""
    ranks = stats.rankdata(scores)
    ins, outs = int(members.sum()), int((~members).sum())
    return float((ranks[members].sum() - ins * (ins + 1) / 2) / (ins * outs))


def _in_order(canaries: Encoded) -> Iterator[Batch]:
    for start in range(0, len(canaries), _BATCH):
        yield canaries.batch(range(start, min(start + _BATCH, len(canaries))))


def _gradients(
    backbone: Backbone, canaries: Encoded, start: Adapter, clip_norm: float
) -> dict[str, np.ndarray]:
    """Return (canaries, entries) by tensor: each canary's clipped gradient at ``start``."""
    backbone.load(start)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    parts: dict[str, list[np.ndarray]] = {}
    for batch in _in_order(canaries):
        count = len(batch.labels)
        grads = backbone.engine.gradients(partial(backbone.losses, batch), count)
        scales = clip_scales(grads.norms(), clip_norm).cpu().numpy()[:, None]
        for name, each in grads.dense().items():
            parts.setdefault(name, []).append(scales * each.reshape(count, -1).cpu().numpy())
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _shares(gradients: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Return (canaries,): how much of each one's gradient explains the change; ridge regression.

    Gradients of canaries resemble each other, so that an inner product alone would say little.
    """
    gram = gradients @ gradients.T
    ridge = _RIDGE * np.trace(gram) / len(gram)
    if ridge == 0:  # A has no gradient while B is zero
        return np.zeros(len(gram))
    wanted: np.ndarray = np.linalg.solve(gram + ridge * np.eye(len(gram)), -gradients @ change)
    return wanted


def membership(
    backbone: Backbone, canaries: Encoded, sent: Sent, clip_norm: float
) -> dict[Kind, np.ndarray]:
    """Return (canaries,) by kind: each canary's share in what the client's tensors became."""
    gradients = _gradients(backbone, canaries, sent.start, clip_norm)
    scores: dict[Kind, np.ndarray] = {}
    for which in sorted({kind(name) for name in gradients}):
        names = [name for name in gradients if kind(name) == which]
        rows = np.hstack([gradients[name] for name in names])
        change = np.concatenate([sent.change[name].reshape(-1) for name in names])
        scores[which] = _shares(rows.astype(float), change.astype(float))
    return scores


@torch.inference_mode()
def _losses(backbone: Backbone, canaries: Encoded, adapter: Adapter) -> np.ndarray:
    backbone.load(adapter)
    parts = [
        backbone.task.losses(backbone.logits(batch), batch.labels.to(backbone.device))
        for batch in _in_order(canaries)
    ]
    losses: np.ndarray = torch.cat(parts).cpu().numpy()
    return losses


def _standard(scores: np.ndarray) -> np.ndarray:
    """Return scores of mean 0 and deviation 1, or zeros where all are the same."""
    spread = float(scores.std())
    result: np.ndarray = (scores - scores.mean()) / spread if spread > 0 else 0.0 * scores
    return result


def audit_run(
    config: Config, *, canaries: int, clients: int, seed: int, confidence: float
) -> RunBound:
    """Train a whole federation on planted canaries and attack it.

    Args:
        config: of the run.
        canaries: number of public test examples that get a wrong label.
        clients: number of simulated clients.
        seed: of coins, batches and noise.
        confidence: of the lower bound.
    """
    planted = mislabelled(config, canaries)
    members = seeded(seed, "audit coins").random(len(planted)) < 0.5
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(config, planted, members, clients, seed, Path(folder))
        return _attacked(federation, planted, members, confidence)


def _attacked(
    federation: Federation, planted: Examples, members: np.ndarray, confidence: float
) -> RunBound:
    """Run the federation to its end and score every canary."""
    config, backbone = federation.config, federation.backbone
    clip_norm = config.privacy.clip_norm
    encoded = backbone.encode(planted)
    before = _losses(backbone, encoded, federation.state.adapter)
    parts, travelled, everything = [], np.zeros(len(planted)), np.zeros(len(planted))
    for sent in federation.rounds():
        for which, scores in membership(backbone, encoded, sent, clip_norm).items():
            parts.append(Part(sent.t, which, which in sent.kinds, auc(scores, members)))
            everything += _standard(scores)
            travelled += _standard(scores) * (which in sent.kinds)
    after = _losses(backbone, encoded, federation.state.adapter)
    guesses = guessed(travelled, members, _SHARE)
    return RunBound(
        one_run(guesses, config.privacy.delta, confidence),
        federation.epsilon,
        guesses,
        auc(travelled, members),
        auc(everything, members),
        auc(before - after, members),
        tuple(parts),
    )
