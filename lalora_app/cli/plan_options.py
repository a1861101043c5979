"""What ``lalora plan`` starts from: its options, checked, and the number of rows."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from lalora_app.privacy.planning import LOCAL_STEPS, Given, Speed
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.run_config import Config, Data
from lalora_app.simulation.launch import Launch, read_launch


def read(args: argparse.Namespace) -> Launch:
    """Return the run that is planned, after the checks that need no data.

    Raises:
        ConfigError: for a key or an option that breaks its law.
    """
    from lalora_app.server.before_start import check_clients

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


def new_file(name: str) -> Path:
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


def sizes(args: argparse.Namespace, launch: Launch) -> tuple[int, int]:
    """Return the number of examples of the smallest and the largest client.

    Raises:
        ConfigError: if δ is not below 1/n, or the data cannot be read.

    Privacy: of the data, only these numbers are used.
    """
    from lalora_app.data.examples import check_client

    config = launch.config
    if args.examples is not None:
        found = [args.examples]
    elif args.data_path is not None:
        found = [_rows_of(args.data_path, config.data)]
    else:
        found = _simulated_sizes(config, launch.nodes)
    for size in found:
        check_client(size, batch_size=1, delta=config.privacy.delta)
    return min(found), max(found)


def _rows_of(path: str, data: Data) -> int:
    """Return the number of rows of a site's own file or folder."""
    from lalora_app.data.contents import inputs_of
    from lalora_app.data.delimited import TextFormat
    from lalora_app.data.sources import read

    whole = str(full_path(path).resolve())
    wanted = {column: "data.input-column" for column in inputs_of(data)}
    form = TextFormat(data.encoding, data.separator)
    columns = read("--data-path", whole, NONE, "train", wanted, form)
    return len(next(iter(columns.values())))


def _simulated_sizes(config: Config, nodes: int) -> list[int]:
    """Return the number of examples of each client, dealt as the run deals them."""
    from lalora_app.data.examples import with_classes
    from lalora_app.data.partition import partition

    return list(map(len, partition(with_classes(config.data), config.seed, nodes)))


def given_of(args: argparse.Namespace, launch: Launch, examples: int) -> Given:
    """Return what the plan starts from; without a limit, a plan costs what the config costs."""
    from lalora_app.server.cohorts import clients_per_round

    config, speed = launch.config, None
    per_round = clients_per_round(config.fraction_train, launch.nodes)
    if args.examples_per_second is not None:
        speed = Speed(args.examples_per_second, per_round if args.sites else 1)
    given = Given(
        examples=examples,
        clients=launch.nodes,
        per_round=per_round,
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        max_seconds=math.inf if args.max_seconds is None else args.max_seconds,
        speed=speed,
        min_steps=args.min_steps,
        local_steps=_local_steps(args, config),
    )
    if args.max_examples is None and args.max_seconds is None:
        rounds = given.client_rounds(config.num_server_rounds)
        return replace(
            given, max_examples=config.train.batch_size * config.train.local_steps * rounds
        )
    return replace(given, max_examples=args.max_examples or math.inf)


def _local_steps(args: argparse.Namespace, config: Config) -> list[int]:
    """Return the numbers of local steps to choose from; by default those that the method allows.

    Raises:
        ConfigError: if the method allows one of the option's numbers not, or is not known.
    """
    from lalora_app.methods.compatibility import lookup, method_of

    method_of(config)
    for steps in args.local_steps or ():
        lookup(config.method, steps)
    return sorted(set(args.local_steps or [n for n in LOCAL_STEPS if _allows(config, n)]))


def _allows(config: Config, local_steps: int) -> bool:
    """Tell whether a round of so many steps trains every factor that the method sends."""
    from lalora_app.methods.compatibility import lookup

    try:
        lookup(config.method, local_steps)
    except ConfigError:
        return False
    return True
