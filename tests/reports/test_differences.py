"""Paired differences with intervals, against plain loops and a known example."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.made_up_runs import PERPLEXITY, record, study
from lalora_app.reports.differences import (
    PairedDifference,
    difference_note,
    difference_table,
    paired_difference,
)
from lalora_app.reports.page import to_html
from lalora_app.reports.table_formats import as_latex, as_markdown, as_text

# Student (1908), additional hours of sleep of ten patients with two drugs.
DRUG_1 = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_2 = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def by_seed(values):
    return dict(enumerate(values))


def test_the_interval_of_students_sleep_data_is_the_published_one():
    found = paired_difference(by_seed(DRUG_2), by_seed(DRUG_1))
    assert (found.seeds, found.mean) == (10, pytest.approx(1.58))
    ends = (found.mean - found.half, found.mean + found.half)
    assert ends == pytest.approx((0.7001142, 2.4598858), abs=1e-6)  # R's t.test(paired = TRUE)
    assert found.verdict() == "better"
    assert found.verdict(lower_is_better=True) == "worse"


def slow_interval(scores, reference):
    """The mean and half the width, by loops in float64; t by bisection on its distribution."""
    differences = []
    for seed, score in scores.items():
        if seed in reference:
            differences.append(np.float64(score) - np.float64(reference[seed]))
    total = np.float64(0)
    for difference in differences:
        total += difference
    mean, squares = total / len(differences), np.float64(0)
    for difference in differences:
        squares += (difference - mean) ** 2
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        inside = stats.t.cdf(middle, len(differences) - 1) < 0.975
        low, high = (middle, high) if inside else (low, middle)
    return mean, low * math.sqrt(squares / (len(differences) - 1) / len(differences))


SCORES = st.dictionaries(
    st.integers(0, 9), st.floats(0, 100, allow_nan=False), min_size=2, max_size=8
)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_it_is_what_a_plain_loop_computes_over_the_common_seeds(scores, reference):
    found = paired_difference(scores, reference)
    common = scores.keys() & reference.keys()
    if not common:
        assert found is None
        return
    assert found.seeds == len(common)
    if len(common) == 1 or found.half is None:
        return
    mean, half = slow_interval(scores, reference)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.half == pytest.approx(half, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_the_opposite_difference_has_the_opposite_verdict(one, other):
    there, back = paired_difference(one, other), paired_difference(other, one)
    if there is None:
        return
    assert there.seeds == back.seeds
    assert (there.half is None) == (back.half is None)
    assert there.half is None or there.half == pytest.approx(back.half, rel=1e-9)
    opposite = {"better": "worse", "worse": "better"}
    assert back.verdict() == opposite.get(there.verdict(), there.verdict())
    assert there.verdict(lower_is_better=True) == back.verdict()


@pytest.mark.parametrize(
    ("scores", "reference"),
    [
        ({0: 2.0}, {0: 1.0}),
        ({0: 2.0, 1: 5.0}, {1: 1.0, 2: 7.0}),
        ({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}),
        ({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.8, 1: 0.7, 2: 0.6}),  # equal but for rounding
        ({0: math.inf, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 1.0}),
    ],
)
def test_without_two_different_finite_pairs_there_is_no_interval(scores, reference):
    found = paired_difference(scores, reference)
    assert found.half is None
    assert found.verdict() == "–"


@pytest.mark.parametrize(
    ("mean", "half", "told"),
    [
        *((2.0, 1.0, "better"), (-2.0, 1.0, "worse"), (1.0, 1.0, "not distinguishable")),
        *((-0.5, 1.0, "not distinguishable"), (0.0, 1.0, "not distinguishable")),
    ],
)
def test_the_verdict_follows_from_the_interval_alone(mean, half, told):
    assert PairedDifference(3, mean, half).verdict() == told


def test_lines_are_compared_at_their_own_epsilon_and_the_reference_is_left_out():
    runs = study()
    table = difference_table(runs, "la-lora")
    found = [(line[0].text, line[1].text) for line in table.cells]
    others = {(r.label, f"{r.epsilon:g}") for r in runs if r.label != "la-lora"}
    assert set(found) == others
    assert len(found) == len(set(found))
    for line in table.cells:
        own = [r for r in runs if (r.label, f"{r.epsilon:g}") == (line[0].text, line[1].text)]
        base = [r for r in runs if r.label == "la-lora" and r.epsilon == own[0].epsilon]
        scores, reference = (
            {r.seed: 100 * r.summary["accuracy"] for r in side} for side in (own, base)
        )
        mean, half = slow_interval(scores, reference)
        assert line[3].text.startswith(f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] ")
        assert line[2].text == "3"


def test_few_seeds_are_told():
    runs = [record(label, seed=seed) for label in ("la-lora", "rolora") for seed in (0, 1)]
    assert difference_table(runs, "la-lora").cells[0][3].text.endswith(", wide")
    three = [*runs, *(record(label, seed=2) for label in ("la-lora", "rolora"))]
    assert not difference_table(three, "la-lora").cells[0][3].text.endswith("wide")
    (line,) = difference_table([runs[0], runs[2]], "la-lora").cells
    assert re.fullmatch(r"[+-]\d+\.\d \[–\]", line[3].text)


def test_of_a_perplexity_the_lower_one_is_better():
    runs = [
        record(label, seed=seed, second="perplexity")
        for label in ("la-lora", "rolora")
        for seed in range(3)
    ]
    for run in runs:
        run.summary["perplexity"] = 10.0 + 0.01 * run.seed * (run.label == "rolora")
        run.summary["perplexity"] -= 5.0 * (run.label == "rolora")
    (line,) = difference_table(runs, "la-lora").cells
    assert PERPLEXITY.title == difference_table(runs, "la-lora").titles[-1]
    assert line[-1].text.endswith("] better")


def test_an_unknown_reference_has_no_differences():
    assert difference_table(study(), "nobody").cells == []


def test_the_table_is_text_markdown_latex_and_part_of_the_page():
    runs = study()
    table = difference_table(runs, "la-lora")
    assert len(as_text(table).splitlines()) == 1 + len(table.cells)
    assert as_markdown(table).count("\n") == 2 + len(table.cells)
    assert as_latex(table).count(r"\\") == 1 + len(table.cells)
    page = to_html(runs, "x", "la-lora")
    assert "<h2>Differences</h2>" in page
    assert difference_note("la-lora").split(":")[0] in page
    assert table.cells[0][3].text in page.replace("&#43;", "+")
    assert "<h2>Differences</h2>" not in to_html(runs, "x")
    assert "<h2>Differences</h2>" not in to_html(runs, "x", "nobody")
