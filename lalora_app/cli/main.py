"""The command ``lalora``: run with an honest exit code, audit, list methods, verify ledgers."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lalora_app.cli.ledger_command import add_ledger, to_delta, to_limit
from lalora_app.privacy.policy import read_policy_file
from lalora_app.settings.run_config import Config, ConfigError, parse


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


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


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


def _audit(args: argparse.Namespace) -> int:
    from lalora_app.audit.one_audit import FAST, FULL, Request, audited
    from lalora_app.audit.write_to_run import publish

    config, clients = _audited_config(args)
    request = Request(config, args.mechanism, clients, args.confidence, FAST if args.fast else FULL)
    broken = False
    for seed in args.seeds:
        found = audited(request, seed, lambda line: print(f"lalora: {line}", file=sys.stderr))
        broken |= found.broken
        print(found.json() if args.json else found.text(), flush=True)
        if args.run:
            publish(found, args.run)
    return 1 if broken else 0


def _audited_config(args: argparse.Namespace) -> tuple[Config, int]:
    """Return the config to attack and its number of clients: a run's own, or the app's."""
    from lalora_app.audit.write_to_run import check_finished
    from lalora_app.cli.simulation import app_defaults
    from lalora_app.results.run_folder import RunFolder, read_config

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


def _diagnose(args: argparse.Namespace) -> int:
    from lalora_app.results.diagnosis import report

    print(report(args.folder))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from lalora_app.results.diagnosis import merge

    merge(args.folder, args.out)
    print(f"lalora: plain weights are in {args.out}")
    return 0


def _ca(args: argparse.Namespace) -> int:
    from lalora_app.cli.credentials import make_ca

    make_ca(args.folder)
    print(f"lalora: ca.crt is for everyone; ca.key stays here, in {args.folder}")
    return 0


def _server(args: argparse.Namespace) -> int:
    from lalora_app.cli.credentials import make_server

    make_server(args.folder, args.hosts, args.days)
    print(f"lalora: server.pem and server.key, for {args.days} days, are in {args.folder}")
    return 0


def _node(args: argparse.Namespace) -> int:
    from lalora_app.cli.credentials import make_node

    make_node(args.folder, args.name)
    print(f"lalora: {args.name}.pub is for the server; {args.name} stays here, in {args.folder}")
    return 0


def _add_credentials(commands: Any) -> None:
    """Add ``lalora credentials``: what a deployment needs, see docs/deployment.md."""
    credentials = commands.add_parser("credentials", help="keys and certificates of a deployment")
    actions = credentials.add_subparsers(required=True, metavar="ACTION")
    ca = actions.add_parser("ca", help="a certificate authority; once, at the server")
    server = actions.add_parser("server", help="the SuperLink's certificate; also to renew it")
    node = actions.add_parser("node", help="a SuperNode's key pair; at its site")
    for action, act in ((ca, _ca), (server, _server), (node, _node)):
        action.add_argument("folder", type=Path)
        action.set_defaults(act=act)
    server.add_argument(
        "--host", action="append", required=True, dest="hosts", help="name or address; repeatable"
    )
    server.add_argument("--days", type=_at_least_one, default=365, help="(default 365)")
    node.add_argument("name", help="of the key's file")


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


def seeds_of(text: str) -> list[int]:
    """Return the seeds of "0,1,2", or of "0..19", both ends included."""
    first, dots, last = text.partition("..")
    return list(range(int(first), int(last) + 1)) if dots else _list_of(int)(text)


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser("audit", help="attack the private step; fails when it is broken")
    audit.add_argument("--app", type=Path, default=Path(), help="folder of the app")
    audit.add_argument("--epsilon", type=to_limit, help="promise to test (default: the run's)")
    audit.add_argument("--delta", type=to_delta, help="of the promise (default: the run's)")
    audit.add_argument("--seeds", "--seed", type=seeds_of, default=[0], metavar="S,S or S..S")
    audit.add_argument("--run", type=Path, help="folder of a finished run, told of the result")
    audit.add_argument("--nodes", type=_at_least_one, default=4, help="simulated clients")
    audit.add_argument("--confidence", type=to_delta, default=0.95, help="of the lower bound")
    audit.add_argument("--mechanism", default="lalora", help="or one that is known to be broken")
    audit.add_argument("--fast", action="store_true", help="the step audit only, and smaller")
    audit.add_argument("--json", action="store_true", help="one object a seed and line")
    audit.set_defaults(act=_audit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lalora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="flwr run in simulation; fails when the run fails")
    run.add_argument("app", nargs="?", type=Path, default=Path(), help="folder of the app")
    run.add_argument("-c", "--run-config", action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--nodes", type=_at_least_one, default=4, help="simulated clients (default 4)")
    run.add_argument(
        "--clients-per-gpu", type=_at_least_one, default=4, help="at the same time (default 4)"
    )
    run.set_defaults(act=_run)

    compare = commands.add_parser("compare", help="methods × epsilons × seeds, resumable")
    compare.add_argument("plan", type=Path, help="TOML: keys of a run, and a [compare] table")
    compare.add_argument("--app", type=Path, default=Path(), help="folder of the app")
    compare.add_argument("--name", help="folder of the results, below the run's output")
    compare.add_argument("--methods", type=_list_of(str), metavar="M,M", help="or controls")
    compare.add_argument("--epsilons", type=_list_of(float), metavar="E,E", help="of controls too")
    compare.add_argument("--seeds", type=_list_of(int), metavar="S,S")
    compare.add_argument("--nodes", type=_at_least_one, help="simulated clients")
    compare.add_argument("--clients-per-gpu", type=_at_least_one, default=4)
    compare.add_argument("--table-only", action="store_true", help="of what is done; run nothing")
    compare.add_argument("--latex", action="store_true", help="print the table in LaTeX as well")
    compare.set_defaults(act=_compare)

    _add_audit(commands)

    methods = commands.add_parser("methods", help="list METHODS")
    methods.set_defaults(act=_methods)

    diagnose = commands.add_parser("diagnose", help="intruder dimensions, sharpness of a run")
    diagnose.add_argument("folder", type=Path, help="of a finished run")
    diagnose.set_defaults(act=_diagnose)

    merge = commands.add_parser("merge", help="a run's result as plain weights")
    merge.add_argument("folder", type=Path, help="of a finished run")
    merge.add_argument("out", type=Path, help="folder of the weights")
    merge.set_defaults(act=_merge)

    _add_credentials(commands)
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
