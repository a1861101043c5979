"""The command ``lalora plan``: noise and cost of a run's batch, steps and rounds, before it starts.

Only the accountants compute; of the data, the number of rows is used. With ``--trial`` processes of
their own time some steps on the run's data.
"""

import argparse
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalora_app.adapter.atomic_files import replace_atomically
from lalora_app.cli.argument_types import (
    add_run_config,
    at_least_one,
    list_of,
    to_delta,
    to_limit,
    to_positive,
)
from lalora_app.cli.plan_options import given_of, new_file, read, sizes
from lalora_app.cli.plan_table import of_given, table
from lalora_app.privacy import planning
from lalora_app.privacy.planning import LEAST_STEPS, Choice, Speed
from lalora_app.simulation.launch import Launch

if TYPE_CHECKING:
    from lalora_app.simulation.traffic import Traffic


def _plan(args: argparse.Namespace) -> int:
    launch = read(args)
    file = new_file(args.write) if args.write else None
    smallest, largest = sizes(args, launch)
    given = given_of(args, launch, smallest)
    train = launch.config.train
    own = (train.batch_size, train.local_steps, launch.config.num_server_rounds)
    planning.check_choice(given, *own)
    # Without a trial the speed is known already.
    planning.check_limits(replace(given, max_seconds=math.inf) if args.trial else given)
    traffic = None
    if args.trial:
        speed, traffic = _trial(launch, sites=args.sites)
        given = replace(given, speed=speed)
    found = planning.plan(given, _progress)
    best, now = planning.best(found), planning.choice(given, *own)
    shown = [now, *(each for each in found if each != now)]
    marks = [("best", best), ("now", now)]
    for line in (*of_given(given, largest), *table(given, traffic, shown, marks)):
        print(line)
    if file is not None:
        _write(file, launch, best)
        print(f"run       {_command(args, launch, file)}")
    print("ok        no data was sent, no ledger was opened, no privacy budget was spent")
    return 0


def _trial(launch: Launch, *, sites: bool) -> "tuple[Speed, Traffic]":
    from lalora_app.simulation.trial import trial

    _say("timing some steps")
    return trial(launch, sites=sites)


def _progress(done: int, of: int) -> None:
    _say(f"calibrating noise, {done + 1} of {of}")


def _say(words: str) -> None:
    """Show on a terminal what takes time; the next line replaces it."""
    if sys.stderr.isatty():
        print(f"\r{words:<40}\r", end="", file=sys.stderr, flush=True)


def _write(path: Path, launch: Launch, best: Choice) -> None:
    """Write the planned keys, and those that the command gave, as TOML for ``lalora run -c``."""
    from lalora_app.results.run_folder import as_toml

    privacy = launch.config.privacy
    keys = launch.values | {
        "num-server-rounds": best.rounds,
        "privacy.epsilon": privacy.epsilon,
        "privacy.delta": privacy.delta,
        "train.local-steps": best.local_steps,
        "train.batch-size": best.batch_size,
    }
    comment = (
        f"# Written by lalora plan, {launch.nodes} clients: {best.steps} steps, noise multiplier "
        f"{best.noise_multiplier:.4g} for the smallest client.\n"
        "# Learning rates are not planned: tune them for this batch.\n"
    )
    with replace_atomically(path) as new:
        new.write_text(comment + as_toml(keys), "utf-8")


def _command(args: argparse.Namespace, launch: Launch, file: Path) -> str:
    """Return the command of the planned run."""
    return shlex.join(
        ["lalora", "run", str(args.app), "--nodes", str(launch.nodes), "-c", str(file)]
    )


def add_plan(commands: Any) -> None:
    """Add `lalora plan` to the parser."""
    plan = commands.add_parser(
        "plan", help="compare noise and cost of batch, steps and rounds; starts nothing"
    )
    plan.add_argument("app", nargs="?", type=Path, default=Path(), help="folder of the app")
    add_run_config(plan)
    plan.add_argument("--nodes", type=at_least_one, help="number of clients (default 4)")
    plan.add_argument("--epsilon", type=to_limit, help="privacy.epsilon (default: the config's)")
    plan.add_argument("--delta", type=to_delta, help="privacy.delta (default: the config's)")
    size = plan.add_mutually_exclusive_group()
    size.add_argument(
        "--examples",
        type=at_least_one,
        help="number of examples of the smallest client (default: of the simulated clients)",
    )
    size.add_argument("--data-path", help="a client's own file or folder, whose rows are counted")
    _add_limits(plan)
    plan.add_argument(
        "--write", metavar="FILE.toml", help="write the best choice for lalora run -c"
    )
    plan.set_defaults(act=_plan)


def _add_limits(plan: argparse.ArgumentParser) -> None:
    """Add the options on steps, cost and speed."""
    plan.add_argument(
        "--min-steps",
        type=at_least_one,
        default=LEAST_STEPS,
        help=f"smallest number of optimiser steps of the run (default {LEAST_STEPS})",
    )
    plan.add_argument(
        "--local-steps",
        type=list_of(at_least_one),
        metavar="K,K",
        help="local steps to choose from (default: those of 1,2,4 that the method allows)",
    )
    plan.add_argument(
        "--max-examples",
        type=at_least_one,
        help="examples of one client's steps in the whole run (default: as many as the config's)",
    )
    plan.add_argument("--max-seconds", type=to_positive, help="duration of the run")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument(
        "--examples-per-second",
        type=to_positive,
        help="speed of the private steps: of the machine that simulates all clients, or with "
        "--sites of one client",
    )
    speed.add_argument(
        "--trial", action="store_true", help="time some steps on the run's data on this machine"
    )
    plan.add_argument("--sites", action="store_true", help="every client has a machine of its own")
