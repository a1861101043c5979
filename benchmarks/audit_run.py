"""Run the end-to-end audit alone; at ε = inf it shows how much its attack finds without noise.

    python benchmarks/audit_run.py inf
    python benchmarks/audit_run.py 3 --method la-lora-full

It prints one JSON object with the areas under the ROC, in all and by round and kind of tensor.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from lalora_app.audit.one_audit import FULL
from lalora_app.audit.run_attack import audit_run
from lalora_app.settings.run_config import parse
from lalora_app.simulation.launch import app_defaults

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run one audit of the default run at one ε."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("epsilon", type=float)
    parser.add_argument("--method", default="la-lora")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    changes = {"privacy.epsilon": args.epsilon, "method": args.method}
    config = parse(app_defaults(ROOT) | changes)
    found = audit_run(config, canaries=FULL.mislabelled, clients=4, seed=args.seed, confidence=0.95)
    seconds = {"cpu": round(time.process_time(), 1)}
    print(json.dumps({"method": args.method, "asked": args.epsilon, **seconds, **asdict(found)}))


if __name__ == "__main__":
    main()
