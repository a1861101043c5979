"""The state before the first round: LoSA's masks and ranks, and nothing of earlier runs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import make_config
from helpers.app_runs import open_run, run, same_bits
from helpers.architectures import save_text_model
from lalora_app.adapter.factors import factor_pairs, sibling
from lalora_app.adapter.parametrisations import rank_mask_name
from lalora_app.data.examples import split
from lalora_app.models.backbone import build
from lalora_app.server.initial_state import (
    first_step,
    initial_state,
    input_norms,
    pooled_inputs,
    pruned,
    pruned_state,
    pruning_drift,
    pruning_step,
    ranks_of,
    shares_of,
    similarities,
    sparsity_at,
)


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


def test_sparsity_rises_to_its_target_in_steps_that_are_spread_over_the_run():
    config = make_config(
        **{"rule.sparsity": 0.5, "rule.sparsity-steps": 5, "num-server-rounds": 10}
    )
    shares = [sparsity_at(step, config.rule) for step in range(1, 6)]
    np.testing.assert_allclose(shares, [0.5 * (1 - (1 - i / 5) ** 3) for i in range(1, 6)])
    assert shares[-1] == 0.5
    found = {t: pruning_step(t, config) for t in range(1, 11)}
    assert {t: step for t, step in found.items() if step} == {2: 2, 4: 3, 6: 4, 8: 5}
    once = make_config(**{"num-server-rounds": 10})
    assert sparsity_at(1, once.rule) == once.rule.sparsity
    assert not any(pruning_step(t, once) for t in range(1, 11))
    short = make_config(**{"rule.sparsity-steps": 5, "num-server-rounds": 2})
    assert [pruning_step(t, short) for t in (1, 2)] == [5, None]  # the later of two steps
    assert [first_step(c) for c in (config, once, short)] == [1, 1, 3]


@given(steps=st.integers(1, 12), rounds=st.integers(1, 12), head=st.integers(0, 3))
def test_every_run_reaches_its_sparsity_after_the_rounds_of_the_head(steps, rounds, head):
    keys = {"rule.sparsity-steps": steps, "train.head-rounds": head}
    config = make_config(**keys, **{"num-server-rounds": rounds + head})
    found = [first_step(config), *(pruning_step(t, config) for t in range(1, rounds + head))]
    assert not any(found[1 : head + 1])
    taken = [step for step in found if step]
    assert taken == sorted(set(taken))
    assert taken[-1] == steps


@pytest.mark.parametrize("gone", [[], [2], [0, 3, 4], [0, 1, 2, 3], range(5)])
@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (7, 5)])
def test_the_drift_of_pruned_features_fits_on_the_wire(shape, gone):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    left, right = pruning_drift(weight, np.array(gone, int))
    assert 1 <= len(right) <= min(shape)
    expected = np.zeros_like(weight)
    expected[:, list(gone)] = -weight[:, list(gone)]
    np.testing.assert_array_equal(left @ right, expected)


def test_without_a_pruned_feature_there_is_no_drift(tiny):
    config = tiny(method="losa", **{"rule.sparsity": 0.0})
    model, start = build(config)
    public = model.encode(split(config.data)[1])
    assert initial_state(config, model, public, start).drift == {}


@pytest.mark.usefixtures("no_waiting", "no_report")
def test_clients_accept_a_pruning_of_some_layers_only(tiny):
    keys = {"rule.sparsity": 0.1, "rule.sparsity-steps": 2, "rule.sparsity-spread": 0.1}
    done = run(tiny(**open_run(method="losa", **keys, **{"num-server-rounds": 2})))
    assert [row["aggregated"] for row in done.rows] == [True, True]
    first = done.grid.trained()[0].start
    masks = [x for n, x in first.items() if n.endswith("lora_fixed.weight") and x.ndim == 1]
    pruned_features = [int(np.sum(mask == 0)) for mask in masks]
    assert min(pruned_features) == 0
    assert max(pruned_features) > 0


def test_a_model_that_gives_its_layers_positions_too_has_similar_layers(tiny, tmp_path):
    """DeBERTa calls query and key a second time, on positions instead of examples."""
    config = tiny(method="losa", **{"model.name": save_text_model("deberta-v3", tmp_path)})
    model, start = build(config)
    model.load(start)
    public = model.encode(split(config.data)[1])
    pooled = pooled_inputs(model, public)
    assert {x.shape[0] for x in pooled.values()} == {min(128, len(public))}
    assert all(np.isfinite(value) for value in similarities(pooled).values())


@given(
    similar=st.dictionaries(st.text(max_size=3), st.floats(0, 5), min_size=1, max_size=5),
    mean=st.sampled_from([0.0, 0.1, 0.5, 0.95]),
    spread=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_shares_of_layers_have_the_mean_and_are_the_best_within_their_bounds(similar, mean, spread):
    found = shares_of(similar, mean, spread)
    width = min(spread, mean, 1 - mean)
    assert found.keys() == similar.keys()
    assert np.mean(list(found.values())) == pytest.approx(mean)
    score = sum(found[name] * similar[name] for name in similar)
    for signs in product((-1, 0, 1), repeat=len(similar)):  # the corners of the allowed shares
        if sum(signs) == 0:
            other = [mean + sign * width for sign in signs]
            assert score >= sum(o * s for o, s in zip(other, similar.values(), strict=True)) - 1e-9


def test_similarity_is_the_sum_of_cka_with_all_layers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 6)).astype(np.float32)
    layers = {"x": x, "turned": x @ np.linalg.qr(rng.standard_normal((6, 6)))[0].astype("f4")}
    layers |= {"other": rng.standard_normal((20, 9)).astype("f4"), "flat": np.ones((20, 4), "f4")}
    found = similarities(layers)

    def cka(one, other):
        one, other = (v.astype(float) - v.astype(float).mean(0) for v in (one, other))
        cross = np.linalg.norm(other.T @ one) ** 2
        own = [np.linalg.norm(v.T @ v) for v in (one, other)]
        return cross / (own[0] * own[1]) if all(own) else 0.0

    for name, inputs in layers.items():
        expected = sum(cka(inputs, other) for other in layers.values())
        assert found[name] == pytest.approx(expected, rel=1e-5)
    assert cka(layers["x"], layers["turned"]) == pytest.approx(1, rel=1e-5)


def test_a_later_step_prunes_the_trained_weight_and_frees_no_feature(tiny):
    keys = {"rule.sparsity": 0.6, "rule.sparsity-steps": 3, "rule.sparsity-spread": 0.1}
    config = tiny(method="losa", **keys)
    model, start = build(config)
    public = model.encode(split(config.data)[1])
    first = initial_state(config, model, public, start)
    rng = np.random.default_rng(0)
    grown = {n: x + rng.standard_normal(x.shape).astype("f4") for n, x in first.adapter.items()}
    trained = first.adapter | {n: grown[n] for pair in factor_pairs(start) for n in pair}
    before = replace(first, adapter=trained)
    after = pruned_state(config, model, public, before, step=2)
    model.load(trained, first.drift)
    norms = input_norms(model, public)
    shares = shares_of(similarities(pooled_inputs(model, public)), sparsity_at(2, config.rule), 0.1)
    model.load(trained)
    scale, errors = config.lora.alpha / config.lora.rank, {}
    for b, a in factor_pairs(start):
        base = model.frozen_weights.weight(b).numpy().astype(float)
        old, new = (x.adapter[sibling(a, "fixed")] for x in (first, after))
        assert not np.any((old == 0) & (new == 1))
        ranks = trained[rank_mask_name(b)].astype(float)
        weight = base + scale * (trained[b] * ranks) @ trained[a].astype(float) * old
        scores = np.linalg.norm(weight * old, axis=0) * norms[b]
        lowest = np.argsort(scores, kind="stable")[: int(shares[b] * len(scores))]
        assert set(np.flatnonzero(new == 0)) == set(lowest) | set(np.flatnonzero(old == 0))
        removed = after.drift[b] @ after.drift[a]
        np.testing.assert_array_equal(removed, np.where(new == 0, -base.astype("f4"), 0))
        errors[b] = np.sum((weight * norms[b])[:, new == 0] ** 2)
        for name in (b, a):
            np.testing.assert_array_equal(after.adapter[name], trained[name])
    for b, rank in ranks_of(errors, config.lora.rank).items():
        assert after.adapter[rank_mask_name(b)].sum() == rank


@pytest.mark.usefixtures("no_waiting", "no_report")
def test_a_run_prunes_after_the_rounds_of_its_steps(tiny):
    keys = {"rule.sparsity": 0.6, "rule.sparsity-steps": 2, "num-server-rounds": 4}
    done = run(tiny(**open_run(method="losa", **keys)))
    features = {}
    for exchange in done.grid.trained():
        masks = [x for n, x in exchange.start.items() if n.endswith("lora_fixed.weight")]
        features[exchange.attempt] = sum(int(np.sum(x == 0)) for x in masks if x.ndim == 1)
    assert features[1] == features[2] < features[3] == features[4]
