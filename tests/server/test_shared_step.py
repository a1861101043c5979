"""The server's step along the mean gradient of all clients, against plain loops in float64."""

import numpy as np
import pytest

from lalora_app.adapter.factors import kind, select
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.filters import TAPS
from lalora_app.models.backbone import build
from lalora_app.server.shared_strategy import gradient_step, require_union_size, with_union_size
from lalora_app.settings.errors import ConfigError

SUM = {
    "privacy.noise-share": "sum",
    "secure-aggregation": "secagg+",
    "train.local-steps": 1,
    "train.sampling-rate": 0.5,
    "train.lr-a": 0.5,
    "train.lr-b": 0.25,
    "train.lr-head": 0.125,
    "train.lr-decay": 0.5,
}


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def smoothed(row: np.ndarray) -> np.ndarray:
    """The binomial filter with mirrored edges, entry by entry."""
    n, found = len(row), np.zeros(len(row))
    for i in range(n):
        for shift, tap in enumerate(TAPS, start=-2):
            j = i + shift
            j = -1 - j if j < 0 else 2 * n - 1 - j if j >= n else j
            found[i] += tap * row[min(max(j, 0), n - 1)]
    return found


@pytest.mark.parametrize("t", [1, 2, 3])
@pytest.mark.parametrize("name", ["rolora", "la-lora", "dp-lora", "ffa-lora", "head-only"])
def test_the_tensors_that_travel_take_one_step_of_their_own_rate(tiny, name, t):
    config = tiny(method=name, **SUM)
    method, start = method_of(config), build(config)[1]
    sent, rng = select(start, method.sent(t, last=False)), np.random.default_rng(t)
    gradient = {n: rng.standard_normal(x.shape) for n, x in sent.items()}
    found = gradient_step(config, method, sent, flat(gradient), t)
    assert set(found) == set(sent)
    rates = {"A": 0.5, "B": 0.25, "head": 0.125}
    for n, x in sent.items():
        step = gradient[n]
        if name == "la-lora" and kind(n) in ("A", "B"):
            axis = 1 if kind(n) == "A" else 0  # input features of A (r, n), outputs of B (m, r)
            step = np.apply_along_axis(smoothed, axis, step)
        expected = x.astype(np.float64) - rates[kind(n)] * 0.5 ** (t - 1) * step
        assert found[n].dtype == np.float32
        np.testing.assert_allclose(found[n], expected, rtol=1e-6, atol=1e-6)


def test_the_schedule_counts_rounds_as_steps(tiny):
    schedule = {"train.schedule": "cosine", "train.lr-decay": 1.0, "num-server-rounds": 4}
    config = tiny(method="head-only", **SUM | schedule)
    method, start = method_of(config), build(config)[1]
    sent = select(start, method.sent(1, last=False))
    ones = np.ones(sum(x.size for x in sent.values()))
    for t, factor in ((1, 1.0), (2, (1 + 0.5**0.5) / 2), (3, 0.5)):
        found = gradient_step(config, method, sent, ones, t)
        np.testing.assert_allclose(flat(sent) - flat(found), 0.125 * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flora", "not a mean"),
        ("fedsvd", "not a mean"),
        ("fedsa-lora", "last round only"),
        ("doppler", "optimiser of its own"),
        ("lora-plus", "optimiser of its own"),
        ("flat-lora", "more than a gradient step"),
        ("fedrot-lora", "more than a gradient step"),
    ],
)
def test_a_method_that_is_more_than_a_gradient_step_is_refused(tiny, name, words):
    with pytest.raises(ConfigError, match=f'noise-share="sum" must be "own" for method {name}.*'):
        method_of(tiny(method=name, **SUM))
    with pytest.raises(ConfigError, match=words):
        method_of(tiny(method=name, **SUM))


def test_every_factor_that_travels_is_trained_in_its_round(tiny):
    for name in ("rolora", "la-lora", "la-lora-full", "dp-lora", "ffa-lora", "head-only"):
        method = method_of(tiny(method=name, **SUM))
        assert not method.keeps_client_state
        for t in (1, 2, 3, 4):
            assert method.trains(t, 0) == method.sent(t, last=False)
            assert method.resident(t, 1) == frozenset()


def test_the_number_of_examples_is_counted_in_a_simulation_and_asked_for_elsewhere(tiny):
    config = tiny(**SUM)
    assert with_union_size(config, 90).train.union_size == 90
    given = with_union_size(tiny(**SUM, **{"train.union-size": 70}), 90)
    assert given.train.union_size == 70
    assert with_union_size(tiny(), 90) == tiny()
    require_union_size(config, simulated=True)
    require_union_size(given, simulated=False)
    require_union_size(tiny(), simulated=False)
    with pytest.raises(ConfigError, match=r"train\.union-size=0 must be the number of examples"):
        require_union_size(config, simulated=False)
