"""Noise from seeds: its distribution, exact sums, and the removal of what nobody needs."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.gaussians import assert_gaussian
from lalora_app.shared_noise.lattice import Constants, Lattice, choose, mean, to_words
from lalora_app.shared_noise.seeded import (
    commitment,
    component,
    new_seeds,
    rounded_gaussian,
    share,
    without_excess,
)
from lalora_app.shared_noise.shares import Cohort

RUN = Constants(0.5, 1.0, 0.1, 1000, 40_000, 10, 3.0, 1e-5, Cohort(4, 3))


def seed(*numbers: int) -> bytes:
    return np.random.default_rng(numbers).bytes(32)


def seeds_of(cohort: Cohort, start: int) -> dict[int, list[bytes]]:
    return {i: chain(cohort, start, i) for i in range(cohort.clients)}


def chain(cohort: Cohort, *numbers: int) -> list[bytes]:
    """The seed of component 0, and those of the removable components by their formula."""
    found = [seed(*numbers, 0), seed(*numbers, 1)]
    while len(found) < len(cohort.fractions):
        found.append(hashlib.sha256(found[-1]).digest())
    return found[: len(cohort.fractions)]


def revealed_by(cohort: Cohort, seeds: dict[int, list[bytes]], missing: int, present) -> dict:
    """The one seed per client that reveals what is superfluous; none if nothing is."""
    first = cohort.needed(missing) + 1
    return {i: seeds[i][first] for i in present if first < len(cohort.fractions)}


def test_the_integers_are_those_of_a_rounded_gaussian():
    for std in (0.7, 3.0):
        found = rounded_gaussian(seed(1), std, 200_000)
        reach = math.ceil(3 * std)
        inner = np.arange(-reach, reach + 1)
        edges = np.concatenate([[-np.inf], inner[:-1] + 0.5, [np.inf]])
        expected = np.diff(stats.norm.cdf(edges / std)) * found.size
        counted = [np.sum(found.clip(-reach, reach) == k) for k in inner]
        assert stats.chisquare(counted, expected).pvalue > 0.001
    assert_gaussian(rounded_gaussian(seed(2), 1e6, 50_001) / 1e6, 1.0)


def test_a_seed_gives_the_same_integers_again_and_another_seed_gives_others():
    first, again, other = (rounded_gaussian(seed(i), 100.0, 1001) for i in (1, 1, 2))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.15
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.15
    assert np.array_equal(first[:500], rounded_gaussian(seed(1), 100.0, 500))
    assert not rounded_gaussian(seed(1), 0.0, 9).any()


def test_the_numbers_follow_from_the_stream_of_the_seed_one_by_one():
    """The formula again, with Python's numbers; the first words are those of RFC 8439's cipher."""
    stream = Cipher(algorithms.ChaCha20(bytes(range(32)), bytes(16)), mode=None).encryptor()
    words = stream.update(bytes(48))
    expected = []
    for start in range(0, 48, 16):
        first, second = (int.from_bytes(words[start + i :][:8], "little") for i in (0, 8))
        radius = math.sqrt(-2 * math.log((first + 0.5) / 2**64)) * 1000.0
        angle = 2 * math.pi * (second + 0.5) / 2**64
        expected += [round(radius * math.cos(angle)), round(radius * math.sin(angle))]
    found = rounded_gaussian(bytes(range(32)), 1000.0, 6).tolist()
    assert found == expected == [-300, 1293, -605, -289, -701, 561]


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(2, 9),
    word=st.sampled_from([32, 64]),
    start=st.integers(0, 99),
    data=st.data(),
)
def test_the_sum_is_exact_with_and_without_drop_outs_and_after_the_removal(
    clients, word, start, data
):
    threshold = data.draw(st.integers(2, clients))
    cohort = Cohort(clients, threshold, data.draw(st.integers(0, threshold - 2)))
    missing = data.draw(st.sets(st.integers(0, clients - 1), max_size=clients - threshold))
    lattice = Lattice(replace(RUN, cohort=cohort, entries=7), 2.0**-12, word)
    rng, seeds = np.random.default_rng(start), seeds_of(cohort, start)
    sums = rng.integers(-(2**20), 2**20, (clients, 7))
    present = sorted(set(range(clients)) - missing)
    total = to_words(np.zeros(7, np.int64), word)
    for i in present:
        total = total + to_words(sums[i] + share(seeds[i], lattice), word)
    silent = data.draw(st.sets(st.sampled_from(present)))
    revealed = revealed_by(cohort, seeds, len(missing), [i for i in present if i not in silent])
    kept = [
        component(seeds[i][k], k, lattice)
        for i in present
        for k in range(len(cohort.fractions))
        if i in silent or k <= cohort.needed(len(missing))
    ]
    expected = sums[present].sum(axis=0) + np.sum(kept, axis=0)
    found = without_excess(total, revealed, len(missing), lattice)
    assert found.dtype == (np.uint32 if word == 32 else np.uint64)
    assert mean(found, lattice, lattice.unit).tolist() == expected.tolist()
    whole = sum(sums[i] + share(seeds[i], lattice) for i in present)
    assert mean(total, lattice, lattice.unit).tolist() == whole.tolist()


def drawn_sum(cohort: Cohort, missing: int) -> tuple[np.ndarray, Lattice]:
    """The noise of a sum after the removal, and the run's integers."""
    lattice = choose(replace(RUN, cohort=cohort))
    seeds, present = seeds_of(cohort, 7), range(missing, cohort.clients)
    total = sum(to_words(share(seeds[i], lattice), lattice.word) for i in present)
    revealed = revealed_by(cohort, seeds, missing, present)
    return mean(without_excess(total, revealed, missing, lattice), lattice, 1.0), lattice


@pytest.mark.parametrize(
    ("cohort", "missing"),
    [
        (Cohort(4, 3), 0),
        (Cohort(4, 3), 1),
        (Cohort(20, 14), 0),
        (Cohort(20, 14), 6),
        (Cohort(20, 14, 4), 0),
        (Cohort(20, 14, 4), 3),
    ],
)
def test_drawn_noise_has_the_variance_of_the_formula_and_never_less_than_promised(cohort, missing):
    noise, lattice = drawn_sum(cohort, missing)
    std = lattice.noise_std * lattice.unit  # of the promise
    expected = std * math.sqrt(cohort.sum_fraction(missing))
    assert noise.std() == pytest.approx(expected, rel=0.02)  # of 40,000 entries: ± 0.35 %
    assert_gaussian(noise, expected)
    counted = 1 - (1 + cohort.colluding) / (cohort.clients - missing)
    assert expected * math.sqrt(counted) >= std * (1 - 1e-12)


@pytest.mark.parametrize(("cohort", "gain"), [(Cohort(4, 3), 1.7), (Cohort(20, 14), 4.0)])
def test_the_mean_has_less_noise_than_with_the_own_noise_of_every_client(cohort, gain):
    noise, _ = drawn_sum(cohort, 0)
    own = RUN.noise_multiplier * RUN.clip_norm * math.sqrt(cohort.clients)
    expected = math.sqrt(cohort.honest_if_all_upload)  # √(n - 1 - c)
    assert own / noise.std() > gain
    assert own / noise.std() == pytest.approx(expected, rel=0.03)


def test_too_many_missing_or_seeds_given_twice_are_refused():
    cohort = Cohort(4, 2)
    lattice = Lattice(replace(RUN, cohort=cohort, entries=3), 2.0**-12, 32)
    total = np.zeros(3, np.uint32)
    right = revealed_by(cohort, seeds_of(cohort, 3), 1, range(3))
    assert without_excess(total, right, 1, lattice).any()
    with pytest.raises(ValueError, match="revealed twice"):
        without_excess(total, {**right, 0: right[1]}, 1, lattice)
    with pytest.raises(ValueError, match="missing=3 must be from 0 to 2"):
        without_excess(total, right, 3, lattice)


@pytest.mark.parametrize("cohort", [Cohort(4, 3), Cohort(20, 14), Cohort(3, 3)])
def test_a_revealed_seed_gives_the_later_ones_and_is_bound_by_the_commitment(cohort):
    seeds = new_seeds(cohort)
    for k in range(1, cohort.removable):
        assert seeds[k + 1] == hashlib.sha256(seeds[k]).digest()
    expected = hashlib.sha256(seeds[-1]).digest()
    for k in range(1, cohort.removable + 1):
        assert commitment(seeds[k], k, cohort) == expected
        assert commitment(seeds[0], k, cohort) != expected
    assert seeds[0] not in {hashlib.sha256(known).digest() for known in seeds}


def test_a_share_needs_one_seed_of_its_own_per_component():
    cohort = Cohort(4, 2)
    lattice = Lattice(replace(RUN, cohort=cohort), 2.0**-12, 32)
    for wrong in ([seed(1)], [seed(1)] * 3):
        with pytest.raises(ValueError, match="needs 3 different seeds"):
            share(wrong, lattice)
    fresh = new_seeds(cohort)
    assert (len(fresh), len({*fresh, *new_seeds(cohort)})) == (3, 6)
    assert {len(s) for s in fresh} == {32}
    with pytest.raises(ValueError, match="key"):
        rounded_gaussian(b"short", 1.0, 2)
