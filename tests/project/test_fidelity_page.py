"""docs/fidelity.md: every system has a table, and every test that it names is there."""

import re

import pytest

from conftest import ROOT
from lalora_app.methods.compatibility import REFUSED
from lalora_app.methods.table import METHODS

PAGE = (ROOT / "docs" / "fidelity.md").read_text("utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n### ")[1:]}
# Controls of a filter, and the baseline of the frozen model, have no paper of their own.
NO_PAPER = {
    name for name in METHODS if re.search(r"-(no-filter|scaled|permuted)$|^head-only$", name)
}


def test_every_method_has_a_section_and_every_refused_name_is_told():
    titles = " ".join(SECTIONS)
    assert {name for name in METHODS if f"`{name}`" not in titles} == NO_PAPER
    assert {name for name in REFUSED if f"`{name}`" not in PAGE} == set()


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_names_the_papers_of_its_methods(title):
    names = [name for name in METHODS if f"`{name}`" in title]
    for paper in {METHODS[name].paper[:16] for name in names}:
        assert paper in title, (paper, title)


def test_every_named_test_is_there():
    named = set(re.findall(r"`([a-z_]+/test_\w+\.py)`", PAGE))
    assert len(named) > 15
    assert {name for name in named if not (ROOT / "tests" / name).is_file()} == set()


@pytest.mark.parametrize("title", SECTIONS)
def test_every_line_says_whether_its_part_is_here_and_why(title):
    lines = [line for line in SECTIONS[title].splitlines() if line.startswith("| ")][1:]
    assert lines
    for line in lines:
        _, here, reason = (cell.strip() for cell in line.strip("|").split("|"))
        assert here.startswith(("yes", "changed", "no", "added")), line
        assert reason, line
