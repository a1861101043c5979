"""The server's first state; for LoSA the masks and ranks of each step, from public inputs.

LoSA (arXiv:2502.14816) prunes single weights, after which ΔW ⊙ M has no factors. Here whole input
features are pruned, since then (W0 + s·B·A) ⊙ M = W0 ⊙ M + s·B·(A ⊙ v): the result is still an
adapter, and merges into the sparse weight. Scores are Wanda's, |W|·‖x‖; ranks follow the layers'
reconstruction errors.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
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


def sparsity_at(step: int, rule: MethodNumbers) -> float:
    """Return the share of pruned features after a step (from 1): s·(1 − (1 − step/n)³).

    s is ``rule.sparsity``, n ``rule.sparsity-steps``. Limit: the last step has s.
    """
    return rule.sparsity * (1 - (1 - step / rule.sparsity_steps) ** 3)


def _step_after(t: int, config: Config) -> int | None:
    """Return the last step that is due after the method's own round ``t``; None: none is."""
    steps, rounds = config.rule.sparsity_steps, config.num_server_rounds - config.head_rounds
    found = [step for step in range(1, steps + 1) if (step - 1) * rounds // steps == t]
    return max(found, default=None)


def first_step(config: Config) -> int:
    """Return the step of pruning before the first round: 1, or more if rounds are few."""
    return _step_after(0, config) or 1


def pruning_step(t: int, config: Config) -> int | None:
    """Return the step of pruning that follows round ``t``; None: none does.

    The steps are spread evenly over the rounds after those of the head alone.
    """
    own = t - config.head_rounds
    return _step_after(own, config) if own > 0 else None


@torch.no_grad()
def pooled_inputs(model: Backbone, public: Encoded) -> dict[str, Array]:
    """Return (examples, n) for every adapted layer: the mean input of each public example."""
    found: dict[str, list[Tensor]] = {}
    examples = min(EXAMPLES, len(public))
    for batch in public.micro_batches(range(examples), BATCH):
        size, calls = len(batch.labels), dict[str, list[Tensor]]()

        def watch(
            name: str, inputs: Tensor, size: int = size, calls: dict[str, list[Tensor]] = calls
        ) -> None:
            if len(inputs) % size == 0:  # else no rows of examples, such as DeBERTa's positions
                rows = inputs.reshape(size, -1, inputs.shape[-1])
                calls.setdefault(name, []).append(rows.float().mean(1))

        with model.frozen_weights.with_input_hook(watch):
            model.logits(batch)
        for name, means in calls.items():
            found.setdefault(name, []).append(torch.stack(means).mean(0))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def similarities(pooled: Mapping[str, Array]) -> dict[str, float]:
    """Return Σ_j CKA(l, j) of each layer l: how much of its input other layers have as well.

    Linear CKA of centred inputs: ⟨K_l, K_j⟩ / (‖K_l‖·‖K_j‖), K = X·Xᵀ (arXiv:1905.00414).
    Limit: a layer whose input is constant has similarity 0 to all others.
    """
    kernels = {}
    for name, inputs in pooled.items():
        centred = inputs.astype(np.float64) - inputs.mean(0, dtype=np.float64)
        kernel = centred @ centred.T
        kernels[name] = kernel / (np.linalg.norm(kernel) or 1.0)
    total = sum(kernels.values())
    return {name: float(np.vdot(kernel, total)) for name, kernel in kernels.items()}


def shares_of(similar: Mapping[str, float], mean: float, spread: float) -> dict[str, float]:
    """Return each layer's share of pruned features: mean ± spread, more where others are similar.

    It is the largest Σ_l share_l·similarity_l with |share_l − mean| ≤ spread and this mean. Limits:
    a spread of 0 gives all layers the mean; of an odd number of layers the middle one has it.
    """
    order = sorted(similar, key=lambda name: (similar[name], name))
    half, width = len(order) // 2, min(spread, mean, 1 - mean)
    less, more = order[:half], order[len(order) - half :]
    found = dict.fromkeys(order, mean)
    return found | dict.fromkeys(less, mean - width) | dict.fromkeys(more, mean + width)


def pruning_drift(weight: Array, gone: NDArray[np.intp]) -> tuple[Array, Array]:
    """Return factors (m, r), (r, n) of −W on the pruned input features, and of 0 elsewhere.

    r is the number of pruned features, at most m and at least 1: a request holds both factors of
    every layer. Limit: without pruned features both are 0.

    Args:
        weight: (m, n).
        gone: the indices of the pruned features.
    """
    m, n = weight.shape
    if len(gone) == 0:
        return np.zeros((m, 1), np.float32), np.zeros((1, n), np.float32)
    if len(gone) <= m:
        return -weight[:, gone], np.eye(n, dtype=np.float32)[gone]
    rows = np.zeros_like(weight)
    rows[:, gone] = -weight[:, gone]
    return np.eye(m, dtype=np.float32), rows


@torch.no_grad()
def pruned_state(
    config: Config, model: Backbone, public: Encoded, state: ServerState, step: int
) -> ServerState:
    """Return the state after a step of LoSA: masks, ranks and the pruned weights.

    Scores and errors are those of W0 + s·B·A with the masks so far; a pruned feature stays pruned.
    The new drift holds −W0 on the pruned features, see :func:`pruning_drift`. Limit: a share that
    prunes no feature of any layer leaves no drift to send.

    Args:
        config: the run's config.
        model: the backbone; the state is loaded into it.
        public: encoded inputs of the public split.
        state: the state before; its masks are all ones before the first step.
        step: number of the step, from 1.

    Privacy: public inputs and noised factors only.
    """
    rule, scale = config.rule, config.lora.alpha / config.lora.rank
    adapter, drift, errors = dict(state.adapter), Adapter(), {}
    model.load(state.adapter, state.drift)
    norms, mean = input_norms(model, public), sparsity_at(step, rule)
    similar = dict.fromkeys(norms, 0.0)
    if rule.sparsity_spread:
        similar = similarities(pooled_inputs(model, public))
    shares = shares_of(similar, mean, rule.sparsity_spread)
    model.load(state.adapter)  # the base without drift
    for b, a in factor_pairs(state.adapter):
        base = model.frozen_weights.weight(b).detach().float().cpu().numpy()
        before = adapter[sibling(a, "fixed")]
        learnt = adapter[b] @ (adapter[rank_mask_name(b)][:, None] * adapter[a])
        weight = base + np.float32(scale) * learnt * before
        kept = pruned(weight * before, norms[b], shares[b]) * before
        gone = np.flatnonzero(kept == 0)
        adapter[sibling(a, "fixed")] = kept
        errors[b] = float(np.sum((weight[:, gone] * norms[b][gone]) ** 2))
        drift[b], drift[a] = pruning_drift(base, gone)
    for b, rank in ranks_of(errors, len(adapter[next(factor_pairs(adapter))[1]])).items():
        room = len(adapter[sibling(b, "A")])
        adapter[rank_mask_name(b)] = (np.arange(room) < rank).astype(np.float32)
    moved = any(factor.any() for factor in drift.values())
    return replace(state, adapter=adapter, drift=drift if moved else {})


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
    return pruned_state(config, model, public, ServerState(start), first_step(config))
