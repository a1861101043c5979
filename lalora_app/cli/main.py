"""The command ``lalora``: run with an honest exit code, audit, list methods, verify ledgers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lalora_app.cli.argument_types import at_least_one, list_of
from lalora_app.cli.audit_command import add_audit
from lalora_app.cli.credentials_command import add_credentials
from lalora_app.cli.ledger_command import add_ledger
from lalora_app.privacy.policy import read_policy_file
from lalora_app.settings.errors import ConfigError


def _policy(args: argparse.Namespace) -> int:
    policy = read_policy_file(args.file, args.dataset)
    print(f"{args.file} allows" + (f" for {args.dataset}" if args.dataset else ""))
    for line in policy.lines():
        print(f"  {line}")
    return 0


def _methods(args: argparse.Namespace) -> int:
    from lalora_app.methods.table import METHODS

    for name, method in METHODS.items():
        rounds = ["+".join(sorted(method.syncs(t))) for t in (1, 2)]
        steps = ["+".join(sorted(method.trains(1, k))) for k in (0, 1)]
        print(
            f"{name:24s} steps {steps[0]:3s} {steps[1]:3s}  sends {rounds[0]:3s} {rounds[1]:3s}",
            end="",
        )
        print(f"  {method.postprocess.__name__:9s} {method.paper}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from lalora_app.cli.simulation import launch

    shared = args.clients_per_gpu
    return launch(args.app, args.run_config, nodes=args.nodes, clients_per_gpu=shared)


def _compare(args: argparse.Namespace) -> int:
    from lalora_app.cli.simulation import app_defaults, launch
    from lalora_app.comparison.plan_file import narrowed
    from lalora_app.comparison.summary import prepare, read_file, summarise

    tables = read_file(args.plan)
    axes = ("name", "methods", "epsilons", "seeds", "nodes")
    given = {axis: getattr(args, axis) for axis in axes if getattr(args, axis) is not None}
    tables["compare"] = narrowed(tables["compare"], given)
    plan, folder = prepare(tables, app_defaults(args.app))
    code = 0
    try:
        if not args.table_only:
            file = f'compare="{folder / "plan.json"}"'
            shared = args.clients_per_gpu
            code = launch(args.app, [file], nodes=plan.nodes, clients_per_gpu=shared)
    finally:  # an interruption too leaves a table of what is done
        print(summarise(plan, folder, latex=args.latex))
    return code


def _diagnose(args: argparse.Namespace) -> int:
    from lalora_app.results.diagnosis import report

    print(report(args.folder))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from lalora_app.results.diagnosis import merge

    merge(args.folder, args.out)
    print(f"lalora: plain weights are in {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lalora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="flwr run in simulation; fails when the run fails")
    run.add_argument("app", nargs="?", type=Path, default=Path(), help="folder of the app")
    run.add_argument("-c", "--run-config", action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--nodes", type=at_least_one, default=4, help="simulated clients (default 4)")
    run.add_argument(
        "--clients-per-gpu", type=at_least_one, default=4, help="at the same time (default 4)"
    )
    run.set_defaults(act=_run)

    compare = commands.add_parser("compare", help="methods × epsilons × seeds, resumable")
    compare.add_argument("plan", type=Path, help="TOML: keys of a run, and a [compare] table")
    compare.add_argument("--app", type=Path, default=Path(), help="folder of the app")
    compare.add_argument("--name", help="folder of the results, below the run's output")
    compare.add_argument("--methods", type=list_of(str), metavar="M,M", help="or controls")
    compare.add_argument("--epsilons", type=list_of(float), metavar="E,E", help="of controls too")
    compare.add_argument("--seeds", type=list_of(int), metavar="S,S")
    compare.add_argument("--nodes", type=at_least_one, help="simulated clients")
    compare.add_argument("--clients-per-gpu", type=at_least_one, default=4)
    compare.add_argument("--table-only", action="store_true", help="of what is done; run nothing")
    compare.add_argument("--latex", action="store_true", help="print the table in LaTeX as well")
    compare.set_defaults(act=_compare)

    add_audit(commands)

    methods = commands.add_parser("methods", help="list METHODS")
    methods.set_defaults(act=_methods)

    diagnose = commands.add_parser("diagnose", help="intruder dimensions, sharpness of a run")
    diagnose.add_argument("folder", type=Path, help="of a finished run")
    diagnose.set_defaults(act=_diagnose)

    merge = commands.add_parser("merge", help="a run's result as plain weights")
    merge.add_argument("folder", type=Path, help="of a finished run")
    merge.add_argument("out", type=Path, help="folder of the weights")
    merge.set_defaults(act=_merge)

    add_credentials(commands)
    add_ledger(commands)
    policy = commands.add_parser("policy", help="check a site's policy file")
    policy.add_argument("file", type=Path)
    policy.add_argument("--dataset", default="", help="a dataset-id")
    policy.set_defaults(act=_policy)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.act(args))
    except ConfigError as error:
        print(f"lalora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lalora: interrupted, and all that was started is stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
