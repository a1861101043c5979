"""The README's table of methods says what METHODS and the default run are."""

import re

from conftest import ROOT, make_config
from lalora_app.methods.table import METHODS

WIDTH, TARGETS = 384, 12  # MiniLM-L6: query and value of six layers


def rows() -> dict[str, list[str]]:
    text = (ROOT / "README.md").read_text("utf-8")
    table = text[text.index("## Methods") : text.index("Bytes are the tensors")]
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines()]
    return {m[1]: row for row in cells if (m := re.fullmatch(r"\**`(.+)`\**", row[0]))}


def test_the_table_lists_every_method_and_its_bytes():
    config = make_config()
    head = config.data.num_labels * (WIDTH + 1)
    factor = TARGETS * WIDTH * config.lora.rank
    found = rows()
    text = (ROOT / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in text for name in METHODS)
    family = ("dp-lora", "ffa-lora", "rolora")
    assert set(found) == {n for n in METHODS if n in family or n.startswith("la-lora")}
    assert f"first request holds both factors ({4 * (2 * factor + head):,} bytes)" in text
    for name, method in ((name, METHODS[name]) for name in found):
        up = 4 * (len(method.syncs(1)) * factor + head)
        assert found[name][4:] == [
            f"{up:,}",
            f"{up:,}",  # down after the first round: what has moved is what was sent
            "yes" if method.exact else "no",
        ]
