"""The two ε of releases with shared noise."""

import math

import pytest

from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.shared_noise.promise import Promise, alone, alone_multiplier, of_sum
from lalora_app.shared_noise.shares import Cohort

RELEASES = [Release(0.02, 4.0, 8)]


def test_the_sum_has_the_epsilon_of_its_whole_noise_and_delta_holds_the_slack():
    found = of_sum(RELEASES, 1e-5, 1e-9)
    assert found.epsilon == epsilon(RELEASES, 1e-5)
    assert found.delta == pytest.approx(1e-5 + (1 + math.exp(found.epsilon)) * 1e-9, rel=1e-12)
    assert of_sum(RELEASES, 1e-5, 0.0).delta == 1e-5


@pytest.mark.parametrize("cohort", [Cohort(4, 3), Cohort(20, 14), Cohort(20, 14, 4)])
def test_an_upload_alone_keeps_what_the_fewest_components_give(cohort):
    fewest = min(cohort.share_fraction(missing) for missing in range(cohort.most_missing + 1))
    assert alone_multiplier(4.0, cohort) == pytest.approx(4.0 * math.sqrt(fewest))
    found = alone(RELEASES, 1e-5, cohort)
    opened = [Release(0.02, 4.0 * math.sqrt(fewest), 8)]
    assert found.epsilon == pytest.approx(epsilon(opened, 1e-5), rel=1e-6)
    assert found.delta == 1e-5
    too_little = [Release(0.02, 4.0 / math.sqrt(cohort.honest), 8)]
    assert found.epsilon > epsilon(too_little, 1e-5) > of_sum(RELEASES, 1e-5, 0.0).epsilon


def test_limits():
    assert of_sum([], 1e-5, 0.0) == Promise(0.0, 1e-5)
    assert alone(RELEASES, 1e-5, Cohort(2, 2)) == of_sum(RELEASES, 1e-5, 0.0)
    bare = [Release(0.02, 0.0, 1)]
    assert of_sum(bare, 1e-5, 0.0) == alone(bare, 1e-5, Cohort(4, 3)) == Promise(math.inf, 1e-5)
