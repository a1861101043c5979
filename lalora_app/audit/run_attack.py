"""The end-to-end audit: a membership attack on one client of a whole federation.

Half of the mislabelled canaries, by a coin each, are in the client's data. The attacker is the
server: it sees the client's uploads of all rounds, and the final model. Its correct guesses give a
lower bound on ε (Steinke et al., arXiv:2305.08846).
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from lalora_app.adapter.factors import Kind
from lalora_app.audit.draw_estimates import (
    BATCH,
    DrawEstimates,
    check_linear,
    draw_estimates,
    in_own_order,
)
from lalora_app.audit.estimators import Guesses, one_run, roc
from lalora_app.audit.planted_federation import Federation, VictimRound, mislabelled
from lalora_app.audit.step_attack import Observed, guessed, likelihood
from lalora_app.data.encoding import Encoded
from lalora_app.data.task_division import with_names
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import Backbone
from lalora_app.privacy.randomness import seeded
from lalora_app.server_state.iterate_average import final_adapter
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config

_GUESSED = 0.25  # share of the canaries to guess "in", and "out"; fixed before any score is seen


@dataclass(frozen=True)
class TensorAuc:
    """The attack's success on one kind of tensor in one round.

    Attributes:
        t: the round, from 1.
        kind: A, B, head or gate.
        sent: whether the kind travelled to the server.
        spread: median deviation of the attack's estimated number of draws of a canary.
        auc: area under the ROC of members against the others; 0.5 for a guess.
        auc_drawn: area under the ROC of the canaries that were drawn against the others.
    """

    t: int
    kind: Kind
    sent: bool
    spread: float
    auc: float
    auc_drawn: float


@dataclass(frozen=True)
class RunBound:
    """The attack's success on a whole run.

    Attributes:
        epsilon: lower bound that assumes (ε, δ)-DP alone, from all sent tensors.
        ledger: the victim's ε by its ledger.
        guesses: the guesses of the bound.
        roc: (false alarm rate, hit rate) by threshold, of the scores from all sent tensors.
        aucs: areas under the ROC of members against the others, from the sent tensors of one kind
            ("sent A" and so on), all sent tensors ("sent"), the others ("not sent"), both
            ("everything"), the canaries' losses before and after the run ("final"), and the true
            draws ("ceiling").
        parts: the success by round and kind of tensor.
    """

    epsilon: float
    ledger: float
    guesses: Guesses
    roc: list[tuple[float, float]]
    aucs: dict[str, float]
    parts: tuple[TensorAuc, ...]


def auc(scores: np.ndarray, members: np.ndarray) -> float:
    """Return the chance that a member scores higher than another canary; 0.5 for a guess."""
    ranks = stats.rankdata(scores)
    ins, outs = int(members.sum()), int((~members).sum())
    if not ins or not outs:
        return 0.5
    return float((ranks[members].sum() - ins * (ins + 1) / 2) / (ins * outs))


@torch.inference_mode()
def _losses(backbone: Backbone, canaries: Encoded, state: ServerState) -> np.ndarray:
    """Return (canaries,): losses of the model that the run would save, on its moved base."""
    backbone.load(final_adapter(state), state.drift)
    parts = [
        backbone.task.losses(backbone.logits(batch), batch.labels.to(backbone.device))
        for batch in canaries.batches(BATCH)
    ]
    return in_own_order(canaries, [part.cpu().numpy() for part in parts])


def membership_scores(estimates: list[DrawEstimates], members: np.ndarray) -> np.ndarray:
    """Return (canaries,): log P(estimates | in) / P(estimates | out); zeros without estimates."""
    if not estimates:
        return np.zeros(len(members))
    x = np.stack([own.x for own in estimates])
    noise, rates = np.stack([own.spread for own in estimates]), [[own.rate] for own in estimates]
    return likelihood(Observed(x, noise, members), np.array(rates))


def audit_run(
    config: Config, *, canaries: int, clients: int, seed: int, confidence: float
) -> RunBound:
    """Train a whole federation on planted canaries and attack it.

    Args:
        config: the run's config.
        canaries: number of public test examples that get a wrong label.
        clients: number of simulated clients.
        seed: seed of coins, batches and noise.
        confidence: confidence of the lower bound.

    Raises:
        ConfigError: if the client's optimiser is not plain SGD.
    """
    check_linear(config, method_of(config))
    config = replace(config, data=with_names(config.data))
    examples = mislabelled(config, canaries)
    members = seeded(seed, "audit coins").random(len(examples)) < 0.5
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(config, examples, members, clients, seed, Path(folder))
        return _attacked(federation, federation.backbone.encode(examples), members, confidence)


def _drawn(federation: Federation, steps: Iterable[int], canaries: int) -> np.ndarray:
    """Return (canaries,) bool: whether each was in a batch of the given steps."""
    first = len(federation.victim.data) - canaries
    drawn = federation.drawn(steps)
    return np.array([first + i in drawn for i in range(canaries)])


def _tensor_auc(
    federation: Federation,
    seen: VictimRound,
    which: Kind,
    own: DrawEstimates,
    members: np.ndarray,
) -> TensorAuc:
    scores = membership_scores([own], members)
    drawn = _drawn(federation, seen.steps[which], len(members))
    return TensorAuc(
        seen.t,
        which,
        which in seen.sent,
        float(np.median(own.spread)),
        auc(scores, members),
        auc(scores, drawn),
    )


def _by_access(
    parts: list[TensorAuc], estimates: list[DrawEstimates]
) -> dict[str, list[DrawEstimates]]:
    """Return the estimates of attackers that see different parts of the victim's changes."""
    pairs = list(zip(parts, estimates, strict=True))
    kinds = dict.fromkeys(part.kind for part in parts)
    return {
        "sent": [own for part, own in pairs if part.sent],
        "not sent": [own for part, own in pairs if not part.sent],
        "everything": estimates,
        **{f"sent {w}": [own for p, own in pairs if p.sent and p.kind == w] for w in kinds},
    }


def _attacked(
    federation: Federation, encoded: Encoded, members: np.ndarray, confidence: float
) -> RunBound:
    """Run the federation to its end, and score and guess every canary."""
    config, backbone = federation.config, federation.backbone
    before = _losses(backbone, encoded, federation.state)
    parts: list[TensorAuc] = []
    estimates: list[DrawEstimates] = []
    for seen in federation.rounds():
        for which, own in draw_estimates(federation, seen, len(members)).items():
            estimates.append(own)
            parts.append(_tensor_auc(federation, seen, which, own, members))
    after = _losses(backbone, encoded, federation.state)
    groups = _by_access(parts, estimates)
    scores = {name: membership_scores(own, members) for name, own in groups.items()}
    aucs = {name: auc(own, members) for name, own in scores.items()}
    steps = range(len(federation.victim.data.drawn))
    aucs["final"] = auc(before - after, members)
    aucs["ceiling"] = auc(_drawn(federation, steps, len(members)).astype(float), members)
    guesses = guessed(scores["sent"], members, _GUESSED)
    return RunBound(
        one_run(guesses, config.privacy.delta, confidence),
        federation.epsilon,
        guesses,
        roc(scores["sent"], members),
        aucs,
        tuple(parts),
    )
