"""Runs through Flower's simulation, by the command line."""

import json
from pathlib import Path

from conftest import ROOT
from lalora_app.cli import main
from lalora_app.results.run_folder import to_toml
from lalora_app.settings.run_config import Config


def run_toml(config: Config, folder: Path) -> int:
    """Run a config by the command line, as a file, with two simulated clients."""
    file = folder / "run.toml"
    file.write_text(to_toml(config), "utf-8")
    return main.main(["run", str(ROOT), "--nodes", "2", "-c", str(file)])


def summaries(config: Config) -> list[dict]:
    found = Path(config.output).glob("*/summary.json")
    return [json.loads(path.read_text("utf-8")) for path in found]
