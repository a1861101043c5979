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
from lalora_app.cli.plan_inputs import given_of, own_batch, sizes
from lalora_app.cli.plan_table import of_given, table
from lalora_app.privacy import planning
from lalora_app.privacy.planning import LEAST_STEPS, Choice, Speed
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.run_config import Config
from lalora_app.simulation.launch import Launch, read_launch

if TYPE_CHECKING:
    from lalora_app.simulation.traffic import Traffic


def _plan(args: argparse.Namespace) -> int:
    launch = _launch(args)
    file = _new_file(args.write) if args.write else None
    found_sizes = sizes(args, launch)
    given = given_of(args, launch, found_sizes)
    train = launch.config.train
    with_steps = launch.config.num_server_rounds - given.rounds_before
    own = (own_batch(launch.config, given.examples), train.local_steps, with_steps)
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
    for line in (*of_given(given, found_sizes), *table(given, traffic, shown, marks)):
        print(line)
    if file is not None:
        _write(file, launch, best, given.rounds_before + best.rounds)
        print(f"run       {_command(args, launch, file)}")
    print("ok        no data was sent, no ledger was opened, no privacy budget was spent")
    return 0


def _launch(args: argparse.Namespace) -> Launch:
    """Return the run that is planned, after the checks that need no data.

    Raises:
        ConfigError: for a key or an option that breaks its law.
    """
    from lalora_app.server.before_start import check_clients, check_head_share

    given = {"privacy.epsilon": args.epsilon, "privacy.delta": args.delta}
    own = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    launch = read_launch(args.app, [*args.run_config, *own], args.nodes)
    config = launch.config
    for key, value in (("compare", config.compare), ("resume-from", config.resume_from)):
        if value != NONE:
            raise ConfigError(f'{key} must be "none": a plan is for one new run')
    if math.isinf(config.privacy.epsilon):
        raise ConfigError("privacy.epsilon=inf must be finite: without noise there is no plan")
    check_clients(config, launch.nodes)
    check_head_share(config)
    _check_options(args)
    return launch


def _check_options(args: argparse.Namespace) -> None:
    """Check the options that need each other."""
    speed = args.trial or args.examples_per_second is not None
    if args.max_seconds is not None and not speed:
        raise ConfigError(
            f"--max-seconds {args.max_seconds:g} must come with --examples-per-second or --trial"
        )
    if args.sites and not speed:
        raise ConfigError("--sites must come with --examples-per-second or --trial")
    if args.trial and args.data_path:
        raise ConfigError(
            f"--data-path {args.data_path} must come without --trial, which times the run's own "
            "data; lalora check times a step on a site's file"
        )


def _new_file(name: str) -> Path:
    """Return the path of a file that can be written.

    Raises:
        ConfigError: if the name is no TOML file's, the file is there, or its folder is not.
    """
    path = full_path(name)
    if path.suffix != ".toml":
        raise ConfigError(f"--write {name} must end in .toml, for lalora run -c")
    if path.exists() or not path.parent.is_dir():
        raise ConfigError(f"--write {name} must be a new file in an existing folder")
    return path


def _trial(launch: Launch, *, sites: bool) -> "tuple[Speed, Traffic]":
    from lalora_app.simulation.trial import trial

    words = "timing some steps and an evaluation"
    if sys.stderr.isatty():
        _say(words)
    else:  # a line in a log: this may take minutes
        print(words, file=sys.stderr, flush=True)
    return trial(launch, sites=sites)


def _progress(done: int, of: int) -> None:
    _say(f"calibrating noise, {done + 1} of {of}")


def _say(words: str) -> None:
    """Show on a terminal what takes time; the next line replaces it."""
    if sys.stderr.isatty():
        print(f"\r{words:<40}\r", end="", file=sys.stderr, flush=True)


def _write(path: Path, launch: Launch, best: Choice, rounds: int) -> None:
    """Write the planned keys, and those that the command gave, as TOML for ``lalora run -c``."""
    from lalora_app.results.run_folder import as_toml

    privacy = launch.config.privacy
    keys = (
        launch.values
        | {
            "num-server-rounds": rounds,
            "privacy.epsilon": privacy.epsilon,
            "privacy.delta": privacy.delta,
            "train.local-steps": best.local_steps,
        }
        | _batch_key(launch.config, best)
    )
    comment = (
        f"# Written by lalora plan, {launch.nodes} clients: {best.steps} steps, noise multiplier "
        f"{best.noise_multiplier:.4g} for the smallest client.\n"
        "# Learning rates are not planned: tune them for this batch.\n"
    )
    with replace_atomically(path) as new:
        new.write_text(comment + as_toml(keys), "utf-8")


def _batch_key(config: Config, best: Choice) -> dict[str, float]:
    """Return the key of the planned batch: a sampling rate, if the run has one."""
    if config.train.sampling_rate:
        return {"train.sampling-rate": best.sampling_rate}
    return {"train.batch-size": int(best.batch_size)}


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
        help="examples of one client's steps in the whole run (default: as many as the config "
        "uses, or no limit with --max-seconds)",
    )
    plan.add_argument("--max-seconds", type=to_positive, help="duration of the run's rounds")
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
