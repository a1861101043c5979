"""The command `lalora audit`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lalora_app.cli.argument_types import at_least_one, to_delta, to_limit, to_seeds
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, parse


def _audit(args: argparse.Namespace) -> int:
    from lalora_app.audit.findings import add_to_run
    from lalora_app.audit.one_audit import FAST, FULL, AuditRequest, run_audit

    config, clients = _audited_config(args)
    size = FAST if args.fast else FULL
    request = AuditRequest(config, args.mechanism, clients, args.confidence, size)
    broken = False
    for seed in args.seeds:
        found = run_audit(request, seed, lambda line: print(f"lalora: {line}", file=sys.stderr))
        broken |= found.broken
        print(found.json() if args.json else found.text(), flush=True)
        if args.run:
            add_to_run(found, args.run)
    return 1 if broken else 0


def _audited_config(args: argparse.Namespace) -> tuple[Config, int]:
    """Return config and number of clients of the audited run, or the app's defaults."""
    from lalora_app.audit.findings import check_finished
    from lalora_app.results.run_folder import RunFolder, read_config
    from lalora_app.simulation.launch import app_defaults

    given = {"privacy.epsilon": args.epsilon, "privacy.delta": args.delta}
    changed = {key: value for key, value in given.items() if value is not None}
    if args.run is None:
        return parse(app_defaults(args.app) | changed), args.nodes
    if changed or len(args.seeds) > 1 or args.mechanism != "lalora":
        raise ConfigError(
            f"run={args.run} must be audited as it was: without --epsilon, --delta and "
            "--mechanism, and with one seed"
        )
    config = read_config(args.run)
    check_finished(args.run)
    return config, RunFolder(args.run).num_clients() or args.nodes


def add_audit(commands: Any) -> None:
    """Add `lalora audit` to the parser."""
    audit = commands.add_parser("audit", help="attack the private step; fails when it is broken")
    audit.add_argument("--app", type=Path, default=Path(), help="folder of the app")
    audit.add_argument(
        "--epsilon",
        type=to_limit,
        help="epsilon to test (default: the app's privacy.epsilon); not allowed with --run",
    )
    audit.add_argument(
        "--delta",
        type=to_delta,
        help="delta to test (default: the app's privacy.delta); not allowed with --run",
    )
    audit.add_argument(
        "--seeds",
        "--seed",
        type=to_seeds,
        default=[0],
        metavar="S,S or S..S",
        help="seeds, one audit per seed (default 0); one seed only with --run",
    )
    audit.add_argument(
        "--run", type=Path, help="folder of a finished run; the result of the audit is added to it"
    )
    audit.add_argument(
        "--nodes",
        type=at_least_one,
        default=4,
        help="number of simulated clients (default 4); with --run the run's own number",
    )
    audit.add_argument(
        "--confidence",
        type=to_delta,
        default=0.95,
        help="probability that all lower bounds hold (default 0.95)",
    )
    audit.add_argument(
        "--mechanism",
        default="lalora",
        help="mechanism to audit: lalora (default), gaussian as a control, or a broken one",
    )
    audit.add_argument(
        "--fast", action="store_true", help="attack the private step only, with fewer trials"
    )
    audit.add_argument("--json", action="store_true", help="print one JSON object per seed")
    audit.set_defaults(act=_audit)
