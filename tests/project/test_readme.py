"""README.md is short, leads to every page, and its numbers are today's."""

import re

from conftest import ROOT
from helpers.documents import inline
from lalora_app.methods.table import METHODS

README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 150
    reachable = README + (ROOT / "docs" / "run-folder.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in reachable, page.name
    first_screen = README.split("## Two commands")[0]
    assert "docs/architecture.md" in first_screen


def test_the_readme_counts_the_methods():
    counts = re.findall(r"(\d+) (?:federated )?methods", README)
    assert counts
    assert {int(count) for count in counts} == {len(METHODS)}
    named = [code for code in inline(ROOT / "README.md") if code in METHODS]
    assert len(set(named)) > 5


def test_the_run_of_the_readme_ends_with_the_lines_of_a_run():
    block = README.split("<!-- output of make run -->")[1].split("<!-- end output -->")[0]
    assert "round 10/10" in block
    assert "epsilon" in block
    assert str(ROOT) not in block
