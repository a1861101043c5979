"""The books: closed form where there is one, a second accountant, and laws of composition."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

import helpers.shared_accounting  # noqa: F401
from lalora_app.privacy.accounting import (
    EPSILON_ERROR,
    Release,
    calibrate,
    epsilon,
    second_epsilon,
)

DELTA = 1e-5
# Opacus bounds the domain of its PRV by RDP and says so where that bound is loose.
# At q = 1 it takes log(0), of a branch that is not used there.
at_rate_one = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def gaussian_delta(bound: float, mu: float) -> float:
    """Balle and Wang, arXiv:1805.06530, Theorem 8, for sensitivity over noise equal to mu."""
    second = math.exp(bound + norm.logcdf(-mu / 2 - bound / mu))  # e^ε alone would overflow
    return norm.cdf(mu / 2 - bound / mu) - second


def gaussian_epsilon(noise_multiplier: float, count: int, delta: float) -> float:
    mu = math.sqrt(count) / noise_multiplier
    return brentq(lambda bound: gaussian_delta(bound, mu) - delta, 0, mu**2 + 10 * mu)


@at_rate_one
@pytest.mark.parametrize(
    ("noise_multiplier", "count", "delta"),
    [(1.0, 1, 1e-5), (2.0, 1, 1e-5), (5.0, 1, 1e-6), (0.7, 1, 1e-3), (4.0, 10, 1e-5)],
)
def test_without_sampling_epsilon_is_that_of_the_analytic_gaussian(noise_multiplier, count, delta):
    exact = gaussian_epsilon(noise_multiplier, count, delta)
    found = epsilon([Release(1.0, noise_multiplier, count)], delta)
    assert exact <= found <= exact + 2 * EPSILON_ERROR
    assert found == pytest.approx(exact, abs=0.01)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_absurd_epsilon_is_not_reported_too_small():
    q, z = 0.05, 0.025
    # The event x > 1/z alone: P ≥ q/2 with the example, Φ(-1/z) without it.
    at_least = math.log(q / 2 - DELTA) - norm.logcdf(-1 / z)
    assert epsilon([Release(q, z, 1)], DELTA) >= at_least


@pytest.mark.parametrize(
    "releases",
    [
        [Release(0.05, 1.0, 60)],
        [Release(0.3, 3.0, 12)],
        [Release(0.1, 1.5, 5), Release(0.2, 4.0, 5)],
    ],
    ids=["one run", "high rate", "two runs"],
)
def test_two_accountants_that_share_no_code_agree(releases):
    first, second = epsilon(releases, DELTA), second_epsilon(releases, DELTA)
    assert abs(first - second) <= 0.01 * second + 0.004


@given(
    q=st.floats(0.02, 0.3),
    z=st.floats(1.5, 4.0),
    count=st.integers(1, 10),
)
@settings(max_examples=2, deadline=None, derandomize=True)
def test_epsilon_grows_with_count_and_rate_and_falls_with_noise_and_delta(q, z, count):
    base = epsilon([Release(q, z, count)], DELTA)
    assert epsilon([Release(q, z, 3 * count)], DELTA) > base
    assert epsilon([Release(1.8 * q, z, count)], DELTA) > base
    assert epsilon([Release(q, 2 * z, count)], DELTA) < base
    assert epsilon([Release(q, z, count)], 100 * DELTA) < base


def test_order_and_grouping_do_not_count():
    first, second = Release(0.1, 1.5, 4), Release(0.2, 2.0, 6)
    together = epsilon([first, second], DELTA)
    assert epsilon([second, first], DELTA) == together
    one_by_one = [Release(0.1, 1.5, 1)] * 4 + [Release(0.2, 2.0, 2)] * 3
    assert epsilon(one_by_one[::-1], DELTA) == together


def test_two_runs_cost_more_than_either_and_less_than_their_sum():
    first, second = [Release(0.1, 1.5, 40)], [Release(0.2, 2.0, 40)]
    alone = [epsilon(first, DELTA), epsilon(second, DELTA)]
    assert max(alone) < epsilon(first + second, DELTA) < sum(alone)


def test_the_ends_of_the_scale():
    assert epsilon([], DELTA) == 0
    assert epsilon([Release(0.1, 1.0, 0)], DELTA) == 0
    assert second_epsilon([], DELTA) == 0
    for account in (epsilon, second_epsilon):
        assert account([Release(0.1, 1.0, 5), Release(0.1, 0.0, 1)], DELTA) == math.inf


def test_calibrated_noise_spends_almost_all_of_its_target_and_never_more():
    z = calibrate(3.0, DELTA, sampling_rate=0.05, steps=60)
    spent = epsilon([Release(0.05, z, 60)], DELTA)
    assert 0.98 * 3 <= spent <= 3


@at_rate_one
def test_calibration_counts_what_is_spent_already():
    past = [Release(1.0, 5.0, 6)]
    z = calibrate(4.0, DELTA, sampling_rate=1.0, steps=6, past=past)
    # Gaussians of sensitivity 1 and noise z compose to one of noise (Σ n/z²)^-1/2.
    together = (6 / 5.0**2 + 6 / z**2) ** -0.5
    assert 0.98 * 4 <= gaussian_epsilon(together, 1, DELTA) <= 4
    assert gaussian_epsilon(z, 6, DELTA) < 0.9 * 4  # the new releases alone


def test_an_infinite_target_needs_no_noise_whatever_the_past():
    past = [Release(0.5, 0.0, 10)]
    assert calibrate(math.inf, DELTA, sampling_rate=0.05, steps=60, past=past) == 0


def test_nothing_left_to_spend_is_said_and_not_calibrated_around():
    past = [Release(0.1, 0.0, 1)]
    assert epsilon(past, DELTA) == math.inf
    with pytest.raises(ValueError, match=r"leave nothing of epsilon=1\.0"):
        calibrate(1.0, DELTA, sampling_rate=0.1, steps=1, past=past)


@pytest.mark.parametrize("count", [10**6, 10**9])
def test_any_count_is_accounted_for_in_little_memory(count):
    """A request may ask for any number of steps: the tight accountant's grid would be terabytes."""
    noise = calibrate(3.0, 1e-5, sampling_rate=0.06, steps=count)
    assert 2.5 < epsilon([Release(0.06, noise, count)], 1e-5) <= 3.0
    with pytest.raises(ValueError, match=f"too little for {count**2} releases"):
        calibrate(3.0, 1e-5, sampling_rate=0.06, steps=count**2)


def test_beyond_the_tight_accountants_grid_epsilon_does_not_fall():
    """Around the count at which RDP takes over."""
    counts = [2**k for k in range(10, 24)]
    found = [epsilon([Release(0.06, 8.0, count)], 1e-5) for count in counts]
    assert found == sorted(found)
    edge = max(i for i, (e, n) in enumerate(zip(found, counts, strict=True)) if e * n**0.5 < 2_000)
    assert 0 < edge < len(counts) - 2  # both were in use
    for value, count in zip(found, counts, strict=True):
        rdp = RDPAccountant()
        rdp.history = [(8.0, 0.06, count)]
        assert value <= rdp.get_epsilon(delta=1e-5)
