"""What ``lalora plan`` starts from: the sizes of the clients, and the limits of the options."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lalora_app.privacy.planning import LOCAL_STEPS, Given, Speed
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.run_config import Config, Data, clients_per_round
from lalora_app.simulation.launch import Launch


def sizes(args: argparse.Namespace, launch: Launch) -> list[int]:
    """Return the number of examples of each client; one number if all have the same.

    Raises:
        ConfigError: if δ is not below 1/n, or the data cannot be read.

    Privacy: of the data, only these numbers are used.
    """
    from lalora_app.data.examples import check_client

    config = launch.config
    if config.has_tasks:
        raise ConfigError(
            f"data.tasks={config.data.tasks} must be 1 for a plan: plan the rounds of one task, "
            "with --examples the fewest examples that a client has of a task"
        )
    if args.examples is not None:
        found = [args.examples]
    elif args.data_path is not None:
        found = [_rows_of(args.data_path, config.data)]
    else:
        found = simulated_sizes(config, launch.nodes)
    for size in found:
        check_client(size, batch_size=1, delta=config.privacy.delta)
    return found


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


def simulated_sizes(config: Config, nodes: int) -> list[int]:
    """Return the number of examples of each client, dealt as the run deals them."""
    from lalora_app.data.partition import clients_data
    from lalora_app.data.task_division import with_names

    named = replace(config, data=with_names(config.data))
    return list(map(len, clients_data(named, nodes)))


def own_batch(config: Config, examples: float) -> float:
    """Return the expected batch of a client with so many examples."""
    return config.train.sampling_rate * examples or config.train.batch_size


def _examples(config: Config, found: Sequence[int], nodes: int) -> float:
    """Return n: of the smallest client, or the mean where one rate holds for all clients."""
    if not config.train.sampling_rate:
        return min(found)
    return config.train.union_size / nodes if config.train.union_size else fmean(found)


def given_of(args: argparse.Namespace, launch: Launch, found: Sequence[int]) -> Given:
    """Return what the plan starts from; without a limit, a plan costs what the config costs.

    Args:
        args: the options.
        launch: the run.
        found: the number of examples of each client.
    """
    from lalora_app.methods.head_rounds import class_sum_releases

    config, speed = launch.config, None
    per_round = clients_per_round(config.fraction_train, launch.nodes)
    if config.sums_classes(1) and per_round < launch.nodes:
        raise ConfigError(
            f"fraction-train={config.fraction_train} must take all {launch.nodes} clients in a "
            f'plan with model.head="class-means": the others release no class sums'
        )
    if args.examples_per_second is not None:
        speed = Speed(args.examples_per_second, per_round if args.sites else 1)
    given = Given(
        examples=_examples(config, found, launch.nodes),
        clients=launch.nodes,
        per_round=per_round,
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        max_seconds=math.inf if args.max_seconds is None else args.max_seconds,
        speed=speed,
        min_steps=args.min_steps,
        local_steps=_local_steps(args, config),
        past=tuple(class_sum_releases(config)),
        rounds_before=int(config.sums_classes(1)),
        head_rounds=config.train.head_rounds,
        one_rate=config.train.sampling_rate > 0,
        shared=config.privacy.shared,
        colluding=config.privacy.colluding,
    )
    if args.max_examples is None and args.max_seconds is None:
        rounds = given.client_rounds(config.num_server_rounds - given.rounds_before)
        batch = own_batch(config, given.examples)
        return replace(given, max_examples=batch * config.train.local_steps * rounds)
    return replace(given, max_examples=args.max_examples or math.inf)


def _local_steps(args: argparse.Namespace, config: Config) -> list[int]:
    """Return the numbers of local steps to choose from; by default those that the method allows.

    Raises:
        ConfigError: if the method allows one of the option's numbers not, or is not known.
    """
    from lalora_app.methods.compatibility import lookup, method_of

    method_of(config)
    if config.privacy.shared:
        return _one_step(args.local_steps)
    for steps in args.local_steps or ():
        lookup(config.method, steps)
    return sorted(set(args.local_steps or [n for n in LOCAL_STEPS if _allows(config, n)]))


def _one_step(chosen: list[int] | None) -> list[int]:
    """Return the one number of local steps of shared noise."""
    if chosen not in (None, [1]):
        raise ConfigError(
            f"--local-steps {','.join(map(str, chosen or ()))} must be 1 for "
            'privacy.noise-share="sum"'
        )
    return [1]


def _allows(config: Config, local_steps: int) -> bool:
    """Tell whether a round of so many steps trains every factor that the method sends."""
    from lalora_app.methods.compatibility import lookup

    try:
        lookup(config.method, local_steps)
    except ConfigError:
        return False
    return True
