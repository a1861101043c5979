"""Write docs/configuration.md from the settings and from the defaults in pyproject.toml.

python scripts/configuration_page.py
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from lalora_app.settings.run_config import Config, from_tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
KINDS = {str: "string", int: "integer", float: "number", bool: "true or false"}
HEADER = "| key | type | default | allowed values | meaning |\n|---|---|---|---|---|"
INTRODUCTION = """\
# Configuration of a run

<!-- Written by scripts/configuration_page.py: edit lalora_app/settings/ or pyproject.toml. -->

Every key has its default in `[tool.flwr.app.config]` of `pyproject.toml`. A run changes keys with
`-c`, by `key=value` pairs (strings in quotes) or by a TOML file:

```
lalora run . -c 'method="rolora" privacy.epsilon=1.0'
lalora run . -c configs/non-private.toml
```

An unknown key, a wrong type or a value that is not allowed stops the run with one line before
anything starts. Some combinations are not allowed either (`robust` needs enough `min-replies`, for
example); the error names both keys. The keys of a client's own machine are in
[node-config.md](node-config.md), those of a comparison in [comparisons.md](comparisons.md)."""


def default_values() -> dict[str, Any]:
    """Return the default of every flat key."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    return from_tables(app["config"])


def allowed(law: str, kind: type) -> str:
    """Return the allowed values as a table cell: the law without its first words."""
    words = re.sub(r"^must (?:(not) )?(?:be|name) ", lambda m: f"{m[1]} " if m[1] else "", law)
    words = re.sub(r'"([^"]+)"', r"`\1`", words)
    return words or KINDS[kind]


def as_default(value: object) -> str:
    """Return a default as TOML writes it; a string without quotes."""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def row(key: str, item: Field[Any], default: object) -> str:
    """Return the table row of one key."""
    kind = cast(type, item.type)
    law, meaning = item.metadata["law"], item.metadata["meaning"]
    cells = (f"`{key}`", KINDS[kind], as_default(default), allowed(law, kind), meaning)
    return "| " + " | ".join(cells) + " |"


def table(section: type, prefix: str, defaults: Mapping[str, object]) -> str:
    """Return the table of one section, without the tables below it."""
    lines = [HEADER]
    for item in fields(section):
        if not is_dataclass(item.type):
            key = prefix + item.name.replace("_", "-")
            lines.append(row(key, item, defaults[key]))
    return "\n".join(lines)


def sections() -> Iterator[tuple[str, str, type]]:
    """Yield heading, prefix of the keys, and class of each section."""
    yield "Run", "", Config
    for item in fields(Config):
        if is_dataclass(item.type):
            yield f"`[{item.name}]`", f"{item.name}.", cast(type, item.type)


def page() -> str:
    """Return the whole page."""
    defaults = default_values()
    parts = [INTRODUCTION]
    for heading, prefix, section in sections():
        about = (section.__doc__ or "").strip()
        parts.append(f"## {heading}\n\n{about}\n\n{table(section, prefix, defaults)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
