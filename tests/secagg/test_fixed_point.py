"""Test the fixed-point numbers that secure aggregation adds up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.secagg import fixed_point


@settings(max_examples=300, deadline=None)
@given(
    clients=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-40, 6),
    data=st.data(),
)
def test_the_mean_of_quantised_updates_is_the_mean_of_the_updates(clients, seed, exponent, data):
    summands = data.draw(st.integers(1, clients))
    rng = np.random.default_rng(seed)
    updates = rng.uniform(-1, 1, (summands, 50)) * min(2.0**exponent, fixed_point.MAX_UPDATE)
    updates[:, :2] = fixed_point.MAX_UPDATE, -fixed_point.MAX_UPDATE  # the sum is largest here
    total = np.zeros(50, np.uint32)
    for update in updates:
        total = total + fixed_point.quantise(update, clients)
    found = fixed_point.dequantised_mean(total, clients, summands)
    assert np.abs(found - updates.mean(axis=0)).max() <= fixed_point.error_bound(clients)


def test_the_bound_is_met_and_is_no_larger_than_it_must_be():
    half = np.array([0.5 * fixed_point.step_size(4) * (1 - 1e-9)])  # rounds to zero
    found = fixed_point.dequantised_mean(fixed_point.quantise(half, 4), 4, 1)
    assert 0.99 < abs(found - half)[0] / fixed_point.error_bound(4) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 64.01, -64.01, 1e30])
def test_what_the_sum_cannot_hold_is_refused_and_not_clipped(value):
    with pytest.raises(fixed_point.RangeError):
        fixed_point.quantise(np.array([0.0, value]), 4)


def test_tensors_come_back_from_the_flat_vector():
    rng = np.random.default_rng(0)
    shapes = {"z": (2, 3), "a": (4,), "m": (1, 5)}
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    upload = {n: rng.standard_normal(s).astype(np.float32) for n, s in reversed(shapes.items())}
    found = fixed_point.add_update(start, fixed_point.update_of(upload, start))
    assert set(found) == set(upload)
    assert all(np.array_equal(found[n], upload[n]) for n in upload)
