"""The table of docs/planning.md is the accountant's; its picture is drawn from the table."""

import sys

import pytest

import helpers.shared_accounting  # noqa: F401
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import planning_page as page

CELLS = [(epochs, steps) for epochs in page.EPOCHS for steps in page.STEPS]


@pytest.mark.parametrize("index", [0, len(CELLS) - 1])
def test_a_line_of_the_table_is_what_the_script_computes(index):
    assert page.written()[index] == page.line(*CELLS[index])


@pytest.mark.slow
def test_the_table_is_what_the_script_writes():
    text = page.PAGE.read_text("utf-8")
    assert text.split(page.BEGIN)[1].split(page.END)[0].strip() == page.table()


def test_the_table_has_every_line_and_its_columns_are_the_formula():
    assert [(row.epochs, row.steps) for row in page.rows()] == CELLS
    for line, (epochs, steps) in zip(page.written(), CELLS, strict=True):
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        batch, z, own, shared = map(float, cells[2:])
        assert batch == epochs * page.EXAMPLES // steps
        assert own == pytest.approx(z / (batch * (page.CLIENTS * steps) ** 0.5), rel=5e-3)
        assert shared == pytest.approx(own / (page.CLIENTS - 1) ** 0.5, rel=5e-3)  # c = 0
