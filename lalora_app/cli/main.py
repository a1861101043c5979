"""The command ``lalora``: plan and simulate runs, compare, audit, read ledgers and results."""

import argparse
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lalora_app.cli.argument_types import (
    add_run_config,
    at_least_one,
    list_of,
    one_of,
    to_limit,
    to_seed,
)
from lalora_app.cli.audit_command import add_audit
from lalora_app.cli.check_command import add_check
from lalora_app.cli.credentials_command import add_credentials
from lalora_app.cli.diagnose_command import add_diagnose
from lalora_app.cli.ledger_command import add_ledger
from lalora_app.cli.plan_command import add_plan
from lalora_app.privacy.policy import PolicyError, read_policy_file
from lalora_app.settings.errors import ConfigError, first_line


def _policy(args: argparse.Namespace) -> int:
    policy = read_policy_file(args.file, args.dataset)
    print(f"{args.file} allows" + (f" for {args.dataset}" if args.dataset else ""))
    for line in policy.lines():
        print(f"  {line}")
    return 0


def _methods(args: argparse.Namespace) -> int:
    from lalora_app.adapter.factors import factors_text
    from lalora_app.methods.table import METHODS

    for name, method in METHODS.items():
        rounds = [factors_text(method.syncs(t)) for t in (1, 2)]
        steps = [factors_text(method.trains(1, k)) for k in (0, 1)]
        print(
            f"{name:24s} steps {steps[0]:4s} {steps[1]:4s}  sends {rounds[0]:4s} {rounds[1]:4s}",
            end="",
        )
        print(f"  {method.postprocess.__name__:9s} {method.paper}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from lalora_app.simulation.start import launch

    return launch(
        args.app,
        args.run_config,
        engine=args.engine,
        nodes=args.nodes,
        workers=args.workers,
        clients_per_gpu=args.clients_per_gpu,
        verbose=args.verbose,
    )


def _compare(args: argparse.Namespace) -> int:
    from lalora_app.comparison.plan_file import narrowed
    from lalora_app.comparison.summary import prepare, read_file, summarise
    from lalora_app.simulation.launch import app_defaults
    from lalora_app.simulation.start import launch

    tables = read_file(args.plan)
    axes = ("name", "methods", "epsilons", "seeds", "nodes", "baselines", "reference")
    given = {axis: getattr(args, axis) for axis in axes if getattr(args, axis) is not None}
    tables["compare"] = narrowed(tables["compare"], given)
    plan, folder = prepare(tables, app_defaults(args.app))
    code = 0
    try:
        if not args.table_only:
            code = launch(
                args.app,
                [f'compare="{folder / "plan.json"}"'],
                engine=args.engine,
                nodes=plan.nodes,
                workers=args.workers,
                clients_per_gpu=args.clients_per_gpu,
                verbose=args.verbose,
            )
    finally:  # an interrupted comparison prints the table of its finished runs, too
        print(summarise(plan, folder, latex=args.latex))
    return code


def _merge(args: argparse.Namespace) -> int:
    from lalora_app.results.merge import merge

    load = merge(args.folder, args.out)
    print(f"lalora: plain weights are in {args.out}; load them with\n\n{load}")
    return 0


def _add_simulation(command: argparse.ArgumentParser) -> None:
    """Add the options that say how clients are simulated and what is printed."""
    command.add_argument(
        "--engine",
        type=one_of("local", "flower"),
        default="local",
        metavar="{local,flower}",
        help="simulate in worker processes (local, the default) or by Flower and Ray (flower)",
    )
    command.add_argument(
        "--workers",
        type=at_least_one,
        default=0,
        help="number of worker processes of the engine local (default: one per core, or one per "
        "share of a GPU)",
    )
    command.add_argument(
        "--clients-per-gpu",
        type=at_least_one,
        default=4,
        help="number of clients that train on a GPU at the same time (default 4)",
    )
    text = "print every line of Flower and Ray as well"
    command.add_argument("--verbose", action="store_true", help=text)


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run in simulation; fails when the run fails")
    run.add_argument("app", nargs="?", type=Path, default=Path(), help="folder of the app")
    add_run_config(run)
    run.add_argument(
        "--nodes",
        type=at_least_one,
        help="number of simulated clients (default 4, or that of the resumed run)",
    )
    _add_simulation(run)
    run.set_defaults(act=_run)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="run every combination of methods, epsilons and seeds; skips finished runs"
    )
    compare.add_argument(
        "plan", type=Path, help="TOML file with keys of the run config and a [compare] table"
    )
    compare.add_argument("--app", type=Path, default=Path(), help="folder of the app")
    compare.add_argument("--name", help="name of the folder of the results, below the key output")
    compare.add_argument(
        "--methods",
        type=list_of(str),
        metavar="M,M",
        help="methods or controls to run (default: the plan's)",
    )
    compare.add_argument(
        "--epsilons",
        type=list_of(to_limit),
        metavar="E,E",
        help="epsilons, of controls too (default: the plan's)",
    )
    compare.add_argument(
        "--seeds", type=list_of(to_seed), metavar="S,S", help="seeds (default: the plan's)"
    )
    compare.add_argument(
        "--nodes", type=at_least_one, help="number of simulated clients (default: the plan's)"
    )
    compare.add_argument(
        "--baselines",
        action="store_true",
        default=None,
        help="add head-only, epsilon inf, and the first method at one client with all data",
    )
    compare.add_argument(
        "--reference", help="line to which the others are compared (default: the first)"
    )
    compare.add_argument(
        "--table-only",
        action="store_true",
        help="print the table of the finished runs; run nothing",
    )
    compare.add_argument("--latex", action="store_true", help="print the table in LaTeX as well")
    _add_simulation(compare)
    compare.set_defaults(act=_compare)


def _add_methods(commands: Any) -> None:
    methods = commands.add_parser(
        "methods", help="list all methods with trained factors, sent factors and paper"
    )
    methods.set_defaults(act=_methods)


def _add_results(commands: Any) -> None:
    merge = commands.add_parser(
        "merge", help="write a run's base model and adapter as plain weights"
    )
    merge.add_argument("folder", type=Path, help="folder of a finished run")
    merge.add_argument("out", type=Path, help="folder for the weights")
    merge.set_defaults(act=_merge)


def _add_policy(commands: Any) -> None:
    policy = commands.add_parser("policy", help="check a site's policy file")
    policy.add_argument("file", type=Path, help="the policy file (TOML)")
    policy.add_argument(
        "--dataset",
        default="",
        help="dataset-id with its own limit in the file (default: the common limit)",
    )
    policy.set_defaults(act=_policy)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lalora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for add in (
        *(
            _add_run,
            add_check,
            add_plan,
            _add_compare,
            add_audit,
            _add_methods,
            add_diagnose,
            _add_results,
        ),
        *(add_credentials, add_ledger, _add_policy),
    ):
        add(commands)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; exit with code 2 if they are not valid."""
    parser = _parser()
    for word in argv:  # argparse drops such a value and takes the default
        if word.startswith("--") and word.endswith("=--"):
            parser.error(f"argument {word.removesuffix('=--')}: expected one argument")
    return parser.parse_args(argv)


def _exit_codes() -> dict[type[Exception], int]:
    """Return the exit codes of the errors that are reported in one line.

    Modules that take seconds to import are looked up only if the command has imported them.
    """
    codes: dict[type[Exception], int] = {ConfigError: 2, OSError: 2, SafetensorError: 2}
    codes |= {sqlite3.DatabaseError: 2, PolicyError: 2}
    optional = {
        ("lalora_app.simulation.flower_commands", "FlowerError"): 1,
        ("lalora_app.simulation.own_processes", "ProcessEndedError"): 1,
        ("lalora_app.privacy.ledger", "LedgerBusyError"): 1,
    }
    for (module, name), code in optional.items():
        if module in sys.modules:
            codes[getattr(sys.modules[module], name)] = code
    return codes


def _message(error: Exception) -> str:
    """Return an error as one line; of an operating system's error, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a failed run, 2 for bad input."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.act(args))
    except KeyboardInterrupt:
        print("lalora: interrupted, and all started processes are stopped", file=sys.stderr)
        return 130
    except tuple(_exit_codes()) as error:
        print(f"lalora: {_message(error)}", file=sys.stderr)
        return next(code for kind, code in _exit_codes().items() if isinstance(error, kind))


if __name__ == "__main__":
    sys.exit(main())
