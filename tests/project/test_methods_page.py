"""docs/methods.md says what METHODS is: its table is the generator's, every entry has a card."""

import importlib.util

from conftest import ROOT
from lalora_app.methods.compatibility import REFUSED
from lalora_app.methods.table import METHODS

TEXT = (ROOT / "docs" / "methods.md").read_text("utf-8")


def generator():
    spec = importlib.util.spec_from_file_location("page", ROOT / "scripts" / "methods_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_script_writes():
    page = generator()
    between = TEXT.split(page.BEGIN)[1].split(page.END)[0]
    assert between.strip() == page.table()


def test_every_method_and_every_refusal_has_its_card():
    cards = TEXT.split("<!-- end table -->")[1]
    for name in (*METHODS, *REFUSED):
        assert f"`{name}`" in cards, name
