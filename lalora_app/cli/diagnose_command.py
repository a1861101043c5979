"""The command ``lalora diagnose``: what finished runs have done to the base model."""

import argparse
from pathlib import Path
from typing import Any

from lalora_app.adapter.atomic_files import replace_atomically
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import full_path


def _diagnose(args: argparse.Namespace) -> int:
    from lalora_app.diagnosis.forgetting import second_data, second_task
    from lalora_app.diagnosis.report import Diagnosis, diagnosed, picture
    from lalora_app.results.run_folder import read_config
    from lalora_app.settings.overrides import merged

    file = full_path(str(args.picture)) if args.picture else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"--picture {file} must be in a folder that exists")
    configs, second = [read_config(folder) for folder in args.folders], None
    if args.second_task:
        keys = merged(args.second_task, "--second-task")
        first, *_ = [second_data(config, keys) for config in configs]
        second = second_task(first)
    runs: list[Diagnosis] = []
    for run in diagnosed(args.folders, second):
        runs.append(run)
        headline = f"{run.title}\n" if len(configs) > 1 else ""
        print("\n" * (len(runs) > 1) + headline + run.text, flush=True)
    if file:
        with replace_atomically(file) as new:
            new.write_text(picture(runs), "utf-8")
        print(f"picture  {file}")
    return 0


def add_diagnose(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser(
        "diagnose", help="say what finished runs have changed in the base model, and what it forgot"
    )
    command.add_argument("folders", type=Path, nargs="+", help="folders of finished runs")
    command.add_argument(
        "--second-task",
        action="append",
        default=[],
        metavar="KEYS",
        help="keys of the table data of a public dataset, such as "
        '\'data.name="../data/ag_news" data.test-split="test"\': compare linear probes of it '
        "before and after each run",
    )
    command.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="write an SVG: similarity of the singular vectors of one layer before and after",
    )
    command.set_defaults(act=_diagnose)
