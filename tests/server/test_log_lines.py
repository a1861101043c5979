"""The server's log: lines of rounds and results are read back as written; all have the prefix."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from lalora_app.server.log_lines import (
    AGGREGATED,
    START,
    TOO_FEW,
    RoundLine,
    parse_result,
    result_text,
)

SCORES = [
    "not evaluated",
    "accuracy 0.9035  balanced accuracy 0.5490",
    "accuracy 0.1  perplexity 9",
]
PHASES = [
    f"phase {phase}  {success}" for phase in ("A", "A+B") for success in (AGGREGATED, TOO_FEW)
]
numbers = st.integers(0, 10**6)


@given(
    done=numbers,
    total=numbers,
    outcome=st.sampled_from(PHASES),
    scores=st.sampled_from(SCORES),
    epsilon=st.integers(0, 10**6).map(lambda n: n / 100) | st.just(float("inf")),
    seconds=numbers.map(lambda n: n / 10),
    left=numbers,
)
def test_the_line_of_a_round_is_read_as_written(
    done, total, outcome, scores, epsilon, seconds, left
):
    line = RoundLine(done, total, outcome, scores, epsilon, seconds, left)
    assert RoundLine.parse(line.text()) == line
    assert line.failed == ("FAILED" in outcome)


@pytest.mark.parametrize("scores", SCORES)
def test_the_line_of_the_start_has_no_duration_and_no_estimate(scores):
    line = RoundLine(0, 10, START, scores, 0.0)
    assert line.text() == f"round 0/10  start  {scores}  epsilon <= 0.00"
    assert RoundLine.parse(line.text()) == line


def test_other_lines_are_no_rounds():
    for text in ("", "round 3: a reply was dropped: x", "round 1/2", "loading model m and data d"):
        assert RoundLine.parse(text) is None


def test_results_are_aligned_and_read_as_written():
    lines = [result_text(label, "x  y") for label in ("folder", "quality", "privacy", "bytes")]
    shown = [parse_result(line) for line in lines]
    assert shown == ["folder   x  y", "quality  x  y", "privacy  x  y", "bytes    x  y"]
    assert parse_result("results are there") is None


def first_arguments(path):
    """Yield the text of each call of ``_log.info`` and its kin, by line number."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("_log."):
            continue
        if node.func.attr not in ("debug", "log"):  # log: lines that the site worker wrote
            yield node.lineno, ast.literal_eval(node.args[0])


def test_every_log_line_of_the_app_has_its_prefix():
    found = [
        (f"{path.name}:{line}", text)
        for path in (ROOT / "lalora_app").rglob("*.py")
        for line, text in first_arguments(path)
    ]
    assert len(found) > 10
    assert [place for place, text in found if not text.startswith(("LaLoRA ", "LaLoRA: "))] == []
