"""Pictures and tables that scripts write are in the repository as the scripts write them."""

import sys
from xml.etree import ElementTree

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import pictures
import results_table

EACH = [(name, theme) for name in pictures.PICTURES for theme in pictures.THEMES]


@pytest.mark.parametrize(("name", "theme"), EACH)
def test_a_picture_is_what_the_script_draws(name, theme):
    path = pictures.IMAGES / f"{name}-{theme}.svg"
    assert path.read_text("utf-8") == pictures.svg(name, theme)


@pytest.mark.parametrize(("name", "theme"), EACH)
def test_a_picture_has_a_title_and_text_that_stays_inside(name, theme):
    root = ElementTree.fromstring(pictures.svg(name, theme))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    kind = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{kind}title").text
    for text in root.iter(f"{kind}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        length = 0.52 * float(text.attrib["font-size"]) * len(text.text)  # a usual sans-serif font
        anchor = text.attrib.get("text-anchor", "start")
        left = x - {"start": 0, "middle": length / 2, "end": length}[anchor]
        assert left >= 0, text.text
        assert left + length <= width, text.text
        assert 0 < y < height, text.text


def test_the_readmes_table_is_that_of_the_results():
    text = (ROOT / "README.md").read_text("utf-8")
    found = text.split(results_table.BEGIN)[1].split(results_table.END)[0]
    assert found.strip() == results_table.table()


def test_the_table_has_a_number_for_every_method_and_budget():
    for name in results_table.TITLES:
        found = {(score.method, score.epsilon) for score in results_table.scores(name)}
        wanted = {(m, e) for m in results_table.METHODS for e in results_table.EPSILONS}
        assert found == wanted, name
