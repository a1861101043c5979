"""The server's state before the first round; for LoSA with its masks and ranks, from public inputs.

LoSA (arXiv:2502.14816) prunes single weights, after which ΔW ⊙ M has no factors. Here whole input
features are pruned, since then (W0 + s·B·A) ⊙ M = W0 ⊙ M + s·B·(A ⊙ v): the result is still an
adapter, and merges into the sparse weight. Scores are Wanda's, |W|·‖x‖; ranks follow the layers'
reconstruction errors.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter.factors import Adapter, Array, factor_pairs, sibling
from lalora_app.adapter.parametrisations import rank_mask_name
from lalora_app.data.encoding import Encoded
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import Backbone
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config, MethodNumbers

EXAMPLES, BATCH = 128, 32


@torch.no_grad()
def input_norms(model: Backbone, public: Encoded) -> dict[str, Array]:
    """Return (n,) for every adapted layer: the root mean square of its inputs, by the name of B.

    Args:
        model: backbone with the adapter of the run's start.
        public: encoded inputs of the public split; labels are not used.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        sums[name] = sums.get(name, torch.zeros_like(rows[0])) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    with model.frozen_weights.with_input_hook(watch):
        for batch in public.micro_batches(range(min(EXAMPLES, len(public))), BATCH):
            model.logits(batch)
    return {name: (total / counts[name]).sqrt().cpu().numpy() for name, total in sums.items()}


def pruned(weight: Array, norms: Array, share: float) -> Array:
    """Return (n,): 0 for the input features of W (m, n) with the lowest scores, 1 for the others.

    The score of feature j is ‖W[:, j]‖·norms[j]. Limit: a share of 0 prunes nothing.
    """
    kept = np.ones(len(norms), np.float32)
    scores = np.linalg.norm(weight, axis=0) * norms
    kept[np.argsort(scores, kind="stable")[: int(share * len(norms))]] = 0
    return kept


def ranks_of(errors: Mapping[str, float], largest: int) -> dict[str, int]:
    """Return each layer's rank, proportional to its error, with mean ``largest / 2``."""
    mean = sum(errors.values()) / len(errors)
    ideal = {b: (largest / 2) * (error / mean if mean > 0 else 1.0) for b, error in errors.items()}
    return {b: int(np.clip(round(wanted), 1, largest)) for b, wanted in ideal.items()}


def losa_adapter_and_drift(
    model: Backbone, public: Encoded, start: Adapter, rule: MethodNumbers
) -> tuple[Adapter, Adapter]:
    """Return the adapter of the start with LoSA's masks and ranks, and the pruned weights.

    Args:
        model: backbone with the adapter of the run's start.
        public: encoded inputs of the public split.
        start: adapter whose masks are all ones.
        rule: numbers of the method; ``sparsity`` is the share of pruned input features.

    Returns:
        (adapter, drift). The drift holds −W0 on the pruned features as a product of two factors;
        its rank is the number of pruned features.

    Privacy: public inputs only.
    """
    norms = input_norms(model, public)
    masked, drift, errors = dict(start), Adapter(), {}
    for b, a in factor_pairs(start):
        weight = model.frozen_weights.weight(b).detach().float().cpu().numpy()
        kept = pruned(weight, norms[b], rule.sparsity)
        gone = np.flatnonzero(kept == 0)
        masked[sibling(a, "fixed")] = kept
        errors[b] = float(np.sum((weight[:, gone] * norms[b][gone]) ** 2))
        if len(gone):
            drift[b] = -weight[:, gone]
            drift[a] = np.eye(len(kept), dtype=np.float32)[gone]
    for b, rank in ranks_of(errors, len(start[next(factor_pairs(start))[1]])).items():
        room = len(start[sibling(b, "A")])
        masked[rank_mask_name(b)] = (np.arange(room) < rank).astype(np.float32)
    return masked, drift


def initial_state(config: Config, model: Backbone, public: Encoded, start: Adapter) -> ServerState:
    """Return the state before the first round, with masks and drift if the method sets them.

    Args:
        config: the run's config.
        model: the backbone; the start is loaded into it.
        public: the encoded examples of the public test split.
        start: the initial adapter of :func:`~lalora_app.models.backbone.build`.

    Privacy: public inputs only.
    """
    if not method_of(config).calibrates:
        return ServerState(start)
    model.load(start)  # an earlier run in this process may have moved the base
    adapter, drift = losa_adapter_and_drift(model, public, start, config.rule)
    return ServerState(adapter, drift=drift)
