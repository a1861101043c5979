"""Simulated runs by the command line."""

import json
from pathlib import Path

from conftest import ROOT
from lalora_app.cli import main
from lalora_app.results.run_folder import to_toml
from lalora_app.settings.run_config import Config


def run_toml(config: Config, folder: Path, engine: str = "flower", nodes: int = 2) -> int:
    """Run a config by the command line, as a file, with simulated clients."""
    file = folder / "run.toml"
    file.write_text(to_toml(config), "utf-8")
    command = ["run", str(ROOT), "--engine", engine, "--nodes", str(nodes), "-c", str(file)]
    return main.main(command)


def summaries(config: Config) -> list[dict]:
    found = Path(config.output).glob("*/summary.json")
    return [json.loads(path.read_text("utf-8")) for path in found]
