"""DP-FedAdamW's server rule: means, and the change that they make."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.server_rules import FEW, SEEDS, assert_near, at, case, drawn, numbers, wide
from lalora_app.adapter.factors import AB, NONE, active_names, kind, select
from lalora_app.adapter.parametrisations import add_memory, change_name, moment_name
from lalora_app.aggregation.average import federated_averaging
from lalora_app.aggregation.remembered_change import average_and_remember


def remembered(seed: int, clients: int):
    """A global adapter in the middle of a run, weights, and uploads with second moments."""
    found, rng = case(seed, clients), np.random.default_rng(seed)
    current = {
        n: rng.standard_normal(x.shape).astype("f4")
        for n, x in add_memory(found.current, numbers()).items()
    }
    uploads = []
    for client in found.clients:
        moments = {moment_name(n): rng.random(1).astype("f4") for n in client}
        uploads.append(select(client | moments, AB))
    return current, found.weights, uploads


@given(seed=SEEDS, clients=st.integers(1, 4))
@FEW
def test_all_that_travels_is_averaged_and_each_change_is_kept(seed, clients):
    current, weights, uploads = remembered(seed, clients)
    adapter = average_and_remember(current, weights, uploads, at()).adapter
    assert adapter.keys() == current.keys()
    for name in uploads[0]:
        mean = sum(w * wide(up[name]) for w, up in zip(weights, uploads, strict=True)) / sum(
            weights
        )
        assert_near(adapter[name], mean)
        if kind(name) != "moment":
            assert_near(adapter[change_name(name)], adapter[name] - wide(current[name]), 1e-5)
    plain = federated_averaging(current, weights, uploads, at()).adapter
    for name in uploads[0]:
        np.testing.assert_array_equal(adapter[name], plain[name])


def test_clients_that_change_nothing_leave_no_change():
    current = add_memory(drawn(np.random.default_rng(0)), numbers())
    upload = select(current, AB)
    adapter = average_and_remember(current, [1.0, 2.0], [upload, upload], at()).adapter
    for name, array in current.items():
        np.testing.assert_array_equal(adapter[name], array)


def test_changes_stay_at_the_server_and_moments_travel_with_factors_only():
    plain = drawn(np.random.default_rng(0))
    whole = add_memory(plain, numbers())
    assert {kind(n) for n in whole.keys() - plain.keys()} == {"fixed", "moment"}
    assert select(whole, AB).keys() == plain.keys() | {moment_name(n) for n in plain}
    assert {kind(n) for n in select(whole, NONE)} == {"head"}
    assert active_names(whole, AB) == plain.keys()
    assert not any(array.any() for n, array in whole.items() if n not in plain)
