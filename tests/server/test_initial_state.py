"""The state before the first round does not depend on runs before it in the same process."""

import numpy as np

from helpers.app_runs import same_bits
from lalora_app.adapter.factors import factor_pairs
from lalora_app.data.examples import split
from lalora_app.models.backbone import build
from lalora_app.server.initial_state import initial_state


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
