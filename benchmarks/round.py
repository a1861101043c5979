"""Measure examples per second of a simulated round, through Flower and Ray.

python benchmarks/round.py                                      # eight clients, the default model
python benchmarks/round.py --clients-per-gpu 8 -c 'train.batch-size=256'
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from lalora_app.settings.run_config import parse
from lalora_app.simulation.start import launch

APP = Path(__file__).resolve().parents[1]


def read(folder: Path) -> tuple[list[dict], dict]:
    """Return the rounds and the config of the only run in ``folder``."""
    import tomllib

    from lalora_app.settings.run_config import from_tables

    (run,) = folder.iterdir()
    lines = (run / "history.jsonl").read_text("utf-8").splitlines()
    config = from_tables(tomllib.loads((run / "config.toml").read_text("utf-8")))
    return [json.loads(line) for line in lines], config


def main() -> None:
    """Run a few rounds and print the median without the first, which builds the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients-per-gpu", type=int, default=8)
    parser.add_argument("-c", "--run-config", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        own = f'num-server-rounds={args.rounds} output="{folder}"'
        overrides = [*args.run_config, own]
        shared = args.clients_per_gpu
        if launch(APP, overrides, nodes=args.nodes, clients_per_gpu=shared):
            raise SystemExit("the run failed")
        rounds, config = read(Path(folder))
    train = parse(config).train
    examples = args.nodes * train.local_steps * train.batch_size
    seconds = statistics.median(entry["seconds"] for entry in rounds[1:])
    print(f"{examples} examples in {seconds:.2f} s: {examples / seconds:.0f} examples a second")


if __name__ == "__main__":
    main()
