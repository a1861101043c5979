"""docs/configuration.md is the generator's output, and every key has a meaning of its own."""

import importlib.util
from dataclasses import fields, is_dataclass

from conftest import ROOT, defaults
from lalora_app.settings.run_config import Config


def generator():
    path = ROOT / "scripts" / "configuration_page.py"
    spec = importlib.util.spec_from_file_location("configuration_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def meanings(kind=Config, prefix=""):
    for item in fields(kind):
        key = prefix + item.name.replace("_", "-")
        if is_dataclass(item.type):
            yield from meanings(item.type, key + ".")
        else:
            yield key, item.metadata["meaning"]


def test_the_page_is_what_the_script_writes():
    page = generator()
    assert page.PAGE.read_text("utf-8") == page.page()


def test_every_key_is_explained_by_a_sentence_of_its_own():
    found = dict(meanings())
    assert set(found) == set(defaults())
    assert len(set(found.values())) == len(found)
    for key, meaning in found.items():
        assert meaning.endswith("."), key
        assert meaning[0].isupper(), key
        assert "|" not in meaning, key  # it would end the table cell


def test_the_page_has_one_row_per_key_with_type_and_default():
    rows = [line for line in generator().page().splitlines() if line.startswith("| `")]
    cells = {row.split(" | ")[0].strip("| `"): row.split(" | ") for row in rows}
    assert set(cells) == set(defaults())
    kinds = {str: "string", int: "integer", float: "number", bool: "true or false"}
    for key, value in defaults().items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert cells[key][1:3] == [kinds[type(value)], f"`{shown}`"], key
