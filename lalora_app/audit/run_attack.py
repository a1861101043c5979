"""The end-to-end audit: who was in one client's data, by what that client sent?

Half of the mislabelled canaries, by a coin each, are in the data of one client. The attacker is
the server: it sees what that client sends in each round, and the final adapter.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from lalora_app.adapter.factors import Kind
from lalora_app.aggregation.server_state import ServerState
from lalora_app.audit.draw_estimates import (
    BATCH,
    DrawEstimates,
    check,
    draw_estimates,
    in_own_order,
)
from lalora_app.audit.estimators import Guesses, one_run, roc
from lalora_app.audit.planted_federation import Federation, Sent, mislabelled
from lalora_app.audit.step_attack import Observed, guessed, likelihood
from lalora_app.data.encoding import Encoded
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import Backbone
from lalora_app.privacy.randomness import seeded
from lalora_app.settings.run_config import Config

_SHARE = 0.25  # of the canaries guessed on either side, fixed before anything is seen


@dataclass(frozen=True)
class Part:
    """What one kind of tensor gave away in one round.

    Attributes:
        t: the round.
        kind: A, B or head.
        sent: whether it travelled.
        spread: of the attack's estimate of how often a canary was drawn.
        auc: of members against the others; 0.5: nothing is learnt.
        auc_drawn: of the canaries that were in one of its batches against the others.
    """

    t: int
    kind: Kind
    sent: bool
    spread: float
    auc: float
    auc_drawn: float


@dataclass(frozen=True)
class RunBound:
    """What a whole run gives away about its canaries.

    Attributes:
        epsilon: lower bound that assumes (ε, δ)-DP alone, from all that travelled.
        ledger: the victim's ε by the accountant.
        guesses: behind the bound.
        roc: of the scores from all that travelled.
        aucs: of members against the others: by kind of what travelled, of all that travelled
            ("sent"), of what did not ("not sent"), of both ("everything"), by the canaries'
            losses under the final adapter ("final"), and if every draw were known ("ceiling").
        parts: by round and kind.
    """

    epsilon: float
    ledger: float
    guesses: Guesses
    roc: list[tuple[float, float]]
    aucs: dict[str, float]
    parts: tuple[Part, ...]


def auc(scores: np.ndarray, members: np.ndarray) -> float:
    """Return the chance that a member scores higher than another; 0.5: nothing is learnt."""
    ranks = stats.rankdata(scores)
    ins, outs = int(members.sum()), int((~members).sum())
    if not ins or not outs:
        return 0.5
    return float((ranks[members].sum() - ins * (ins + 1) / 2) / (ins * outs))


@torch.inference_mode()
def _losses(backbone: Backbone, canaries: Encoded, state: ServerState) -> np.ndarray:
    """Return (canaries,): losses of the global model, on the base that the run has moved."""
    backbone.load(state.adapter, state.drift)
    parts = [
        backbone.task.losses(backbone.logits(batch), batch.labels.to(backbone.device))
        for batch in canaries.batches(BATCH)
    ]
    return in_own_order(canaries, [part.cpu().numpy() for part in parts])


def scored(found: list[DrawEstimates], members: np.ndarray) -> np.ndarray:
    """Return (canaries,): the likelihood ratio of "in" over several releases; none: zeros."""
    if not found:
        return np.zeros(len(members))
    x = np.stack([part.x for part in found])
    noise, rates = np.stack([part.spread for part in found]), [[part.rate] for part in found]
    return likelihood(Observed(x, noise, members), np.array(rates))


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

    Raises:
        ConfigError: if the client's optimiser is not plain SGD.
    """
    check(config, method_of(config))
    planted = mislabelled(config, canaries)
    members = seeded(seed, "audit coins").random(len(planted)) < 0.5
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(config, planted, members, clients, seed, Path(folder))
        return _attacked(federation, federation.backbone.encode(planted), members, confidence)


def _drawn(federation: Federation, steps: list[int], canaries: int) -> np.ndarray:
    first = len(federation.records) - canaries
    drawn = federation.drawn(steps)
    return np.array([first + i in drawn for i in range(canaries)])


def _part(
    federation: Federation, sent: Sent, which: Kind, found: DrawEstimates, members: np.ndarray
) -> Part:
    scores = scored([found], members)
    drawn = _drawn(federation, sent.steps[which], len(members))
    own = auc(scores, members), auc(scores, drawn)
    return Part(sent.t, which, which in sent.kinds, float(np.median(found.spread)), *own)


def _groups(parts: list[Part], found: list[DrawEstimates]) -> dict[str, list[DrawEstimates]]:
    """Return what attackers who see more or less of the run have."""
    pairs = list(zip(parts, found, strict=True))
    kinds = dict.fromkeys(part.kind for part in parts)
    return {
        "sent": [own for part, own in pairs if part.sent],
        "not sent": [own for part, own in pairs if not part.sent],
        "everything": found,
        **{f"sent {w}": [own for p, own in pairs if p.sent and p.kind == w] for w in kinds},
    }


def _attacked(
    federation: Federation, encoded: Encoded, members: np.ndarray, confidence: float
) -> RunBound:
    """Run the federation to its end and score every canary."""
    config, backbone = federation.config, federation.backbone
    before = _losses(backbone, encoded, federation.state)
    parts: list[Part] = []
    found: list[DrawEstimates] = []
    for sent in federation.rounds():
        for which, own in draw_estimates(federation, sent, len(members)).items():
            found.append(own)
            parts.append(_part(federation, sent, which, own, members))
    after = _losses(backbone, encoded, federation.state)
    scores = {name: scored(own, members) for name, own in _groups(parts, found).items()}
    aucs = {name: auc(own, members) for name, own in scores.items()}
    every = range(config.num_server_rounds * config.train.local_steps)
    aucs["final"] = auc(before - after, members)
    aucs["ceiling"] = auc(_drawn(federation, list(every), len(members)).astype(float), members)
    guesses = guessed(scores["sent"], members, _SHARE)
    return RunBound(
        one_run(guesses, config.privacy.delta, confidence),
        federation.epsilon,
        guesses,
        roc(scores["sent"], members),
        aucs,
        tuple(parts),
    )
