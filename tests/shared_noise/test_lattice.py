"""Integers of a run: sensitivity of a rounded sum, choice of unit and word, decoding."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.settings.errors import ConfigError
from lalora_app.shared_noise.lattice import (
    Constants,
    Lattice,
    choose,
    mean,
    to_lattice,
    to_words,
)
from lalora_app.shared_noise.shares import Cohort

RUN = Constants(
    clip_norm=0.5,
    noise_multiplier=1.0,
    sampling_rate=0.02,
    examples=51_200,
    entries=40_000,
    releases=40,
    epsilon=1.0,
    delta=1e-5,
    cohort=Cohort(20, 14),
)


def clipped(gradients: np.ndarray, clip_norm: float) -> np.ndarray:
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1, clip_norm / np.maximum(norms, 1e-300))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    examples=st.integers(1, 6),
    entries=st.sampled_from([1, 2, 5, 100]),
    scale=st.floats(-4, 4),
    unit=st.floats(-6, 3),
    place=st.sampled_from(["anywhere", "half way"]),
)
def test_one_example_moves_a_rounded_sum_by_at_most_the_sensitivity(
    seed, examples, entries, scale, unit, place
):
    rng, unit = np.random.default_rng(seed), 2.0 ** round(unit)
    others = clipped(rng.standard_normal((examples, entries)) * 10**scale, 1.0).sum(axis=0)
    if place == "half way":  # every entry is about to be rounded up
        others = (np.floor(others / unit) + 0.5) * unit * (1 - 1e-9)
    one = clipped(np.abs(rng.standard_normal((1, entries))) * 10**scale, 1.0)[0]
    moved = to_lattice(others + one, unit) - to_lattice(others, unit)
    constants = replace(RUN, clip_norm=1.0, entries=entries)
    assert np.linalg.norm(moved) <= Lattice(constants, unit, 32).sensitivity * (1 + 1e-12)


def test_the_root_of_the_number_of_entries_is_needed():
    entries, clip_norm = 10_000, 1.0
    unit = 1000 * clip_norm / math.sqrt(entries)  # an example moves an entry by 1/1000
    others = np.full(entries, 0.4995 * unit)
    moved = to_lattice(others + clip_norm / math.sqrt(entries), unit) - to_lattice(others, unit)
    lattice = Lattice(replace(RUN, clip_norm=clip_norm, entries=entries), unit, 32)
    assert clip_norm / unit < 1 < np.linalg.norm(moved) == math.sqrt(entries)
    assert np.linalg.norm(moved) <= lattice.sensitivity
    assert lattice.noise_std == lattice.sensitivity


@st.composite
def runs(draw) -> Constants:
    clients = draw(st.integers(2, 100))
    threshold = draw(st.integers(2, clients))
    return Constants(
        clip_norm=draw(st.floats(1e-3, 1e3)),
        noise_multiplier=draw(st.floats(0.1, 50)),
        sampling_rate=draw(st.floats(1e-4, 1)),
        examples=draw(st.integers(100, 10**6)),
        entries=draw(st.integers(10, 10**8)),
        releases=draw(st.integers(1, 10**4)),
        epsilon=draw(st.floats(0.1, 20)),
        delta=draw(st.sampled_from([1e-5, 1e-9])),
        cohort=Cohort(clients, threshold, draw(st.integers(0, threshold - 2))),
    )


@settings(max_examples=100, deadline=None)
@given(run=runs())
def test_a_chosen_lattice_keeps_its_laws(run):
    lattice = choose(run)
    assert lattice.delta_slack < 1e-9 * run.delta
    assert math.sqrt(run.entries) * lattice.unit / run.clip_norm <= 0.01
    assert math.log2(lattice.unit).is_integer()
    assert lattice.largest_sum < 2.0 ** (31 if lattice.word == 32 else 53)
    with_32 = Lattice(run, lattice.unit * 8, 32)  # the coarsest of the three choices
    assert lattice.word == 32 or with_32.largest_sum >= 2.0**31 / 2


@pytest.mark.parametrize("clients", [4, 20, 100])
@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_study_settings_need_32_bits_and_next_to_no_slack(clients, epsilon):
    cohort = Cohort(clients, -(-2 * clients // 3))
    lattice = choose(replace(RUN, cohort=cohort, epsilon=epsilon))
    assert lattice.word == 32
    assert lattice.delta_slack < 1e-9 * lattice.constants.delta
    assert lattice.sensitivity * lattice.unit < 1.001 * RUN.clip_norm


def test_large_batches_get_64_bits_and_absurd_ones_are_refused():
    large = replace(RUN, sampling_rate=1.0, examples=10**7, entries=10**7)
    assert choose(large).word == 64
    absurd = replace(large, examples=10**12)
    with pytest.raises(ConfigError, match=r"train.sampling-rate=1 must be smaller .* at most 54"):
        choose(absurd)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_clip_norm_that_scales_no_noise_is_refused(value):
    with pytest.raises(ConfigError, match=r"privacy\.clip-norm=.* must be finite and greater"):
        choose(replace(RUN, clip_norm=value))


@pytest.mark.parametrize("value", [0.0, 1.1, math.nan])
def test_a_rate_that_is_no_chance_is_refused(value):
    with pytest.raises(ConfigError, match=r"train\.sampling-rate=.* must be greater than 0"):
        choose(replace(RUN, sampling_rate=value))


def test_without_noise_there_is_no_slack():
    lattice = choose(replace(RUN, noise_multiplier=0.0, epsilon=math.inf))
    assert (lattice.noise_std, lattice.distance, lattice.delta_slack) == (0, 0, 0)


def test_little_noise_among_many_clients_gets_a_finer_unit():
    crowd = replace(RUN, cohort=Cohort(1000, 667), entries=10, noise_multiplier=0.1)
    lattice = choose(crowd)
    smallest = lattice.noise_std**2 * float(min(crowd.cohort.fractions))
    assert lattice.delta_slack < 1e-9 * RUN.delta
    assert smallest > 2
    assert Lattice(crowd, lattice.unit * 4, 32).delta_slack >= 1e-9 * RUN.delta


@pytest.mark.parametrize("word", [32, 64])
def test_sums_of_words_are_decoded_and_wrap_beyond_the_range(word):
    lattice = Lattice(RUN, 2.0**-10, word)
    parts = np.array([[5, -7, 2**30, -(2**31)], [-9, 7, -(2**30), 0]])
    total = to_words(parts[0], word) + to_words(parts[1], word)
    assert mean(total, lattice, 2.0).tolist() == [-4 / 2048, 0, 0, -(2.0**31) / 2048]
    wrapped = to_words(np.array([2 ** (word - 1) - 1]), word) + to_words(np.array([1]), word)
    assert mean(wrapped, lattice, 1.0)[0] == -(2.0 ** (word - 1)) / 1024


def test_entries_out_of_all_proportion_are_cut_and_not_refused():
    found = to_lattice(np.array([1e300, -1e300, 1.4, -1.5]), 1.0)
    assert found.tolist() == [2**62, -(2**62), 1, -2]


def test_a_sum_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="must be finite"):
        to_lattice(np.array([0.0, math.nan]), 1.0)
