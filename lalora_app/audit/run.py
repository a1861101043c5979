"""The end-to-end audit: who was in one client's data, by what that client sent?

Half of the mislabelled canaries, by a coin each, are in the data of one client. The attacker is
the server: it sees what that client sends in each round, and the final adapter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import stats

from lalora_app.adapter import Adapter, Kind, kind
from lalora_app.audit.estimators import Guesses, one_run
from lalora_app.audit.federation import Federation, Sent, mislabelled
from lalora_app.audit.step import guessed
from lalora_app.backbone import Backbone
from lalora_app.config import Config
from lalora_app.encoding import Batch, Encoded
from lalora_app.privacy.mechanism import clip_scales
from lalora_app.privacy.randomness import seeded

_SHARE = 0.25  # of the canaries guessed on either side, fixed before anything is seen
_BATCH = 32


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


def alignment(
    backbone: Backbone, canaries: Encoded, sent: Sent, clip_norm: float
) -> dict[Kind, np.ndarray]:
    """Return (canaries,) by kind: how far the change goes down each canary's clipped gradient."""
    backbone.load(sent.start)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    scores: dict[Kind, list[np.ndarray]] = {}
    for batch in _in_order(canaries):
        count = len(batch.labels)
        grads = backbone.engine.gradients(partial(backbone.losses, batch), count)
        scales = clip_scales(grads.norms(), clip_norm).cpu().numpy()
        sums: dict[Kind, np.ndarray] = {}
        for name, each in grads.dense().items():
            along = each.reshape(count, -1).cpu().numpy() @ sent.change[name].reshape(-1)
            sums[kind(name)] = sums.get(kind(name), 0.0) - scales * along
        for which, values in sums.items():
            scores.setdefault(which, []).append(values)
    return {which: np.concatenate(values) for which, values in scores.items()}


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
    federation = Federation(config, planted, members, clients, seed)
    backbone, clip_norm = federation.backbone, config.privacy.clip_norm
    encoded = backbone.encode(planted)
    before = _losses(backbone, encoded, federation.state.adapter)
    parts, travelled, everything = [], np.zeros(len(planted)), np.zeros(len(planted))
    for sent in federation.rounds():
        for which, scores in alignment(backbone, encoded, sent, clip_norm).items():
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
