"""Write the examples of each simulated client to a file, for a rehearsal of a deployment.

python scripts/rehearsal_sites.py FOLDER --sites 3 -c configs/deployment/rehearsal.toml

Site i of n gets FOLDER/site-i.jsonl with the examples, in order, that ``lalora run --nodes n`` of
the same config gives to client i. With equal names and seeded noise, both runs end with the same
adapter. Text data only. If the columns are not "text" and "label" with the labels 0 and 1, every
site must set input-column, label-column and labels in its node config.
"""

import argparse
import json
import tomllib
from dataclasses import replace
from pathlib import Path

from lalora_app.data.examples import Examples, with_classes
from lalora_app.data.partition import partition
from lalora_app.settings.run_config import Config, from_tables, parse
from lalora_app.simulation.launch import app_defaults

ROOT = Path(__file__).resolve().parents[1]


def lines(examples: Examples, config: Config) -> str:
    """Return a client's examples as JSON lines with the run's own columns."""
    columns = [name.strip() for name in config.data.input_column.split(",")]
    names = config.data.class_names or ("0",)  # of a language model's one label, which nobody reads
    rows = []
    for content, label in zip(examples.contents, examples.labels, strict=True):
        texts = [content] if isinstance(content, str) else list(content)
        row = dict(zip(columns, texts, strict=True)) | {config.data.label_column: names[label]}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(rows)


def main() -> None:
    """Write one file per site."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("-c", "--run-config", type=Path, required=True, help="TOML of the run")
    args = parser.parse_args()
    tables = tomllib.loads(args.run_config.read_text("utf-8"))
    config = parse(app_defaults(ROOT) | from_tables(tables))
    config = replace(config, data=with_classes(config.data))
    args.folder.mkdir(parents=True, exist_ok=True)
    for i, examples in enumerate(partition(config.data, config.seed, args.sites)):
        (args.folder / f"site-{i}.jsonl").write_text(lines(examples, config), "utf-8")


if __name__ == "__main__":
    main()
