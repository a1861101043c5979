"""The bound on the cost of rounding, against distributions computed by convolution."""

import math

import pytest

from helpers.rounded_sums import (
    randomly_rounded,
    rounded,
    sum_of_rounded,
    total_variation,
)
from lalora_app.shared_noise.rounding import distance, slack
from lalora_app.shared_noise.shares import Cohort


@pytest.mark.parametrize("std", [8, 16, 32, 64])
@pytest.mark.parametrize("shares", [2, 4, 20])
def test_the_distance_from_one_rounded_gaussian_is_0_0202(shares, std):
    found = sum_of_rounded([std**2 / shares] * shares, 800)
    constant = total_variation(found, rounded(std**2, 800)) * std**2 / (shares - 1)
    assert constant == pytest.approx(0.0202, rel=0.02)
    limit = math.exp(-0.5) / math.sqrt(2 * math.pi) / 12  # φ(1)/12: a variance larger by (m-1)/12
    assert constant == pytest.approx(limit, rel=0.13 / std)


@pytest.mark.parametrize(
    ("cohort", "missing", "std"),
    [(Cohort(4, 3), 1, 8), (Cohort(20, 14), 6, 40), (Cohort(20, 14, 4), 4, 40)],
)
def test_the_0_0202_counts_components_and_not_clients(cohort, missing, std):
    honest = cohort.honest_if_all_upload - missing
    variances = [float(f) * std**2 for f in cohort.fractions[: cohort.needed(missing) + 1]] * honest
    assert sum(variances) == pytest.approx(std**2)
    found = total_variation(sum_of_rounded(variances, 800), rounded(std**2, 800)) * std**2
    assert found / (len(variances) - 1) == pytest.approx(0.0202, rel=0.02)
    assert found > 1.9 * 0.0202 * (honest - 1)


@pytest.mark.parametrize(
    "variances",
    [[0.3, 0.3], [0.5, 0.5], [0.4] * 4, [0.5] * 8, [2, 0.3, 0.3], [4, 0.2, 0.5], [0.7] * 3, [1, 2]],
    ids=str,
)
def test_the_sum_is_a_randomly_rounded_gaussian_up_to_the_bound(variances):
    found = sum_of_rounded(variances, 40)
    reference = randomly_rounded(sum(variances), len(variances), 40)
    assert reference.sum() == pytest.approx(1, abs=1e-9)
    apart = total_variation(found, reference)
    assert apart <= distance(len(variances), min(variances)) + 1e-8


def test_the_bound_is_of_the_right_order():
    for variance in (0.3, 0.4, 0.5, 0.6):
        apart = total_variation(
            sum_of_rounded([variance] * 2, 40), randomly_rounded(2 * variance, 2, 40)
        )
        assert apart > 0.4 * distance(2, variance)


def test_limits():
    assert distance(1, 0.01) == 0
    assert distance(2, 0.01) == 1
    assert distance(10**9, 0.2) == 1
    assert distance(1001, 4.0) == pytest.approx(1000 * math.exp(-4 * math.pi**2), rel=1e-6)
    assert distance(10, 400.0) == 0
    assert slack(1e9, 0.0) == 0
    assert slack(1e9, 1e-300) == math.inf
    assert slack(1.0, 1e-9) == pytest.approx((1 + math.e) * 1e-9)
