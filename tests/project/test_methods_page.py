"""docs/methods.md says what METHODS is: its table is the generator's, every entry has a card."""

import importlib.util

from conftest import ROOT, make_config
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


def test_the_bytes_of_the_main_methods_follow_from_the_shapes():
    width, targets = 384, 12  # MiniLM-L6: query and value of six layers
    config = make_config()
    head = config.data.num_labels * (width + 1)
    factor = targets * width * config.lora.rank
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): row for row in rows}
    for name in ("dp-lora", "ffa-lora", "rolora", "la-lora", "la-lora-full"):
        sent = f"{4 * (len(METHODS[name].syncs(1)) * factor + head):,}"
        first = f"{4 * (2 * factor + head):,}"
        assert found[name][3:6] == [sent, first, sent], name
        assert (found[name][6] == "yes") == METHODS[name].exact, name
