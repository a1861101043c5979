"""The state before the first round: LoSA's masks and ranks, and nothing of earlier runs."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.app_runs import same_bits
from lalora_app.adapter.factors import factor_pairs, sibling
from lalora_app.adapter.parametrisations import rank_mask_name
from lalora_app.data.examples import split
from lalora_app.models.backbone import build
from lalora_app.server.initial_state import initial_state, input_norms, pruned, ranks_of


def test_losa_starts_from_the_original_weights_after_another_run_has_moved_them(tiny):
    config = tiny(method="losa", **{"rule.sparsity": 0.3})
    model, start = build(config)
    model.load(start)
    public = model.encode(split(config.data)[1])
    weights = {b: model.frozen_weights.weight(b).numpy().copy() for b, _ in factor_pairs(start)}
    first = initial_state(config, model, public, start)
    for b, a in factor_pairs(first.drift):
        removed = first.drift[b] @ first.drift[a]
        expected = np.where(removed.any(axis=0), -weights[b], 0)
        np.testing.assert_array_equal(removed, expected)
    rng = np.random.default_rng(0)
    moved = {n: rng.standard_normal(x.shape).astype(np.float32) for n, x in first.drift.items()}
    model.load({name: array + 1 for name, array in first.adapter.items()}, moved)
    again = initial_state(config, model, public, start)
    assert same_bits(again.adapter, first.adapter)
    assert same_bits(again.drift, first.drift)


@given(
    weight=arrays(np.float32, (5, 8), elements=st.floats(-3, 3, width=16)),
    norms=arrays(np.float32, 8, elements=st.floats(0, 3, width=16)),
    share=st.floats(0, 0.99),
)
@settings(deadline=None, max_examples=50)
def test_the_features_of_the_lowest_scores_are_pruned(weight, norms, share):
    """Wanda's score of a whole input feature, by a loop in float64."""
    scores = [
        sum(float(w) ** 2 for w in weight[:, j]) ** 0.5 * float(norms[j]) for j in range(len(norms))
    ]
    kept = pruned(weight, norms, share)
    gone = np.flatnonzero(kept == 0)
    assert len(gone) == int(share * len(norms))
    left = np.flatnonzero(kept)
    assert all(scores[i] <= scores[j] * (1 + 1e-5) + 1e-9 for i in gone for j in left)


def test_ranks_are_proportional_to_the_errors_within_their_bounds():
    assert ranks_of({"x": 1.0, "y": 2.0, "z": 3.0}, 8) == {"x": 2, "y": 4, "z": 6}
    assert ranks_of({"x": 1.0, "y": 0.0, "z": 50.0}, 8) == {"x": 1, "y": 1, "z": 8}
    assert ranks_of({"x": 0.0, "y": 0.0}, 8) == {"x": 4, "y": 4}


def test_masks_ranks_and_pruned_weights_follow_from_the_inputs_of_the_layers(tiny):
    config = tiny(method="losa", **{"rule.sparsity": 0.4, "lora.rank": 4})
    model, start = build(config)
    public = model.encode(split(config.data)[1])
    seen, layers = {}, dict(model.model.named_modules())
    hooks = [
        layers[b.removesuffix(".lora_B.weight")].register_forward_pre_hook(
            lambda _, inputs, b=b: seen.setdefault(b, []).append(inputs[0].double())
        )
        for b, _ in factor_pairs(start)
    ]
    model.load(start)
    norms = input_norms(model, public)
    for hook in hooks:
        hook.remove()
    state = initial_state(config, model, public, start)
    errors = {}
    for b, a in factor_pairs(start):
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[b]]).numpy()
        expected = np.sqrt(np.mean(rows**2, axis=0))
        np.testing.assert_allclose(norms[b], expected, rtol=1e-5)
        weight = model.frozen_weights.weight(b).numpy().astype(np.float64)
        kept = state.adapter[sibling(a, "fixed")]
        assert int(np.sum(kept == 0)) == int(0.4 * len(kept))
        errors[b] = np.sum((weight[:, kept == 0] * expected[kept == 0]) ** 2)
    mean = np.mean(list(errors.values()))
    for b, error in errors.items():
        mask = state.adapter[rank_mask_name(b)]
        assert mask.sum() == np.clip(round(4 * error / mean / 2), 1, 4)
        assert sorted(mask, reverse=True) == list(mask)
