"""The ServerApp: check the config, find the clients, run the rounds, write the results."""

import logging
import secrets
import time
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lalora_app.comparison.runner import run_plan
from lalora_app.data.encoding import Encoded
from lalora_app.data.examples import Examples, split
from lalora_app.data.labels import shown
from lalora_app.data.partition import label_counts
from lalora_app.data.task_division import division_of, of_task, with_names
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.unread_keys import unread_keys
from lalora_app.models import backbone as backbones
from lalora_app.results.run_folder import (
    ResumePoint,
    RunFolder,
    check_writable,
    new_folder,
    old_folder,
)
from lalora_app.server.after_round import AfterRound
from lalora_app.server.ending import finish
from lalora_app.server.enrolment import SETTLE_SECONDS, find_clients
from lalora_app.server.initial_state import initial_state
from lalora_app.server.log_lines import folder_text
from lalora_app.server.secure_strategy import SecureFederatedLora
from lalora_app.server.shared_strategy import (
    SharedNoiseLora,
    after_interruption,
    require_union_size,
    with_union_size,
)
from lalora_app.server.strategy import FederatedLora
from lalora_app.settings.errors import ConfigError, first_line
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.run_config import Config, from_tables, parse
from lalora_app.wire import tensors

app = ServerApp()
_log = logging.getLogger("flwr")
STRATEGIES = {
    ("none", "own"): FederatedLora,
    ("secagg+", "own"): SecureFederatedLora,
    ("secagg+", "sum"): SharedNoiseLora,
}


def _partition(config: Config, clients: int) -> dict[str, Any]:
    """Return the number of examples per label and simulated client."""
    labels = list(config.data.class_names)
    return {"labels": labels, "clients": label_counts(config, clients)}


def _run_name(config: Config) -> str:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.method}-{stamp}-{secrets.token_hex(3)}"


def _resumed(config: Config) -> tuple[RunFolder, ResumePoint]:
    """Return the folder and the last state of the run in ``resume-from``.

    Raises:
        ConfigError: if the folder holds no run, or a run with another config.
    """
    saved = full_path(config.resume_from) / "config.toml"
    if not saved.is_file():
        raise ConfigError(f'resume-from="{config.resume_from}" must be the folder of a run')
    folder = old_folder(config, from_tables(tomllib.loads(saved.read_text("utf-8"))))
    return folder, folder.resume_point()


def _warn_of_truncated_texts(test: Encoded, config: Config) -> None:
    """Warn of truncated test texts; training texts are private, so only public ones count."""
    if full := test.full():
        _log.warning(
            "LaLoRA %d of %d test texts fill model.max-length=%d tokens: longer ones are truncated",
            *(full, len(test), config.model.max_length),
        )


def _warn_of_missing_classes(test: Examples, config: Config) -> None:
    """Warn of classes without a public test example; their accuracy is not measured."""
    if config.data.label_column == NONE:
        return
    names, there = config.data.class_names, set(test.labels)
    if missing := [name for index, name in enumerate(names) if index not in there]:
        _log.warning(
            "LaLoRA no public test example has a label of %d of %d classes: %s",
            *(len(missing), len(names), shown(missing)),
        )


def _tests_by_task(model: backbones.Backbone, test: Examples, config: Config) -> list[Encoded]:
    """Return the encoded test examples of each task; nothing for a run without tasks.

    Raises:
        ConfigError: if a task has no test example.
    """
    if not config.has_tasks:
        return []
    parts = [of_task(test, config, task) for task in range(config.data.tasks)]
    for task, part in enumerate(parts):
        if not part:
            values = shown(division_of(config).values_of(task))
            raise ConfigError(
                f"data.tasks={config.data.tasks} must leave a public test example to each task, "
                f"and task {task + 1} has none: {values}"
            )
    return [model.encode(part) for part in parts]


def _warn_if_not_private(config: Config) -> None:
    if config.privacy.noise == "seeded":
        _log.warning('LaLoRA privacy.noise="seeded": this run is repeatable and NOT private')
    elif not config.privacy.private:
        _log.warning("LaLoRA privacy.epsilon=inf: this run is NOT private")


def _warn_of_unread_keys(config: Config) -> None:
    if unread := unread_keys(config):
        effect = "the value has no effect" if len(unread) == 1 else "the values have no effect"
        keys = ", ".join(unread)
        _log.warning(
            'LaLoRA this run of method="%s" does not read %s: %s', config.method, keys, effect
        )


def _train(grid: Grid, strategy: FederatedLora, after_round: AfterRound) -> None:
    config, state = strategy.config, strategy.state
    strategy.start(
        grid=grid,
        initial_arrays=tensors.to_record(state.adapter),
        num_rounds=config.num_server_rounds - state.attempts,
        timeout=config.round_timeout,
        evaluate_fn=after_round,
    )
    finish(after_round)


def run(grid: Grid, config: Config, settle: float = 0.0) -> None:
    """Run one federation from start (or checkpoint) to results.

    Args:
        grid: connection to the clients.
        config: checked config of the run.
        settle: seconds for which the list of nodes must stay the same before the run starts.

    Raises:
        ConfigError: before any client trains, if the run is not possible with this config.
    """
    began = time.monotonic()
    method = method_of(config)
    _warn_if_not_private(config)
    _warn_of_unread_keys(config)
    check_writable(config.output)
    config = replace(config, data=with_names(config.data))
    _log.info("LaLoRA loading model %s and data %s", config.model.name, config.data.name)
    model, start = backbones.build(config)
    train, public = split(config.data)
    given, config = config, with_union_size(config, len(train))
    _warn_of_missing_classes(public, config)
    test = model.encode(public)
    tasks = _tests_by_task(model, public, config)
    _warn_of_truncated_texts(test, config)
    resumed = None if config.resume_from == "none" else _resumed(config)
    sizes = sum(array.size for array in start.values())
    _log.info("LaLoRA model with %d target layers, %d trainable parameters", model.targets, sizes)
    clients = find_clients(grid, config, settle, model.fingerprint)
    require_union_size(given, clients.simulated)
    if resumed and resumed[0].num_clients() != len(clients.nodes):
        raise ConfigError(
            f'resume-from="{config.resume_from}" must have {resumed[0].num_clients()} clients '
            f"again, not {len(clients.nodes)}"
        )
    folder, point = resumed or (
        new_folder(config, _run_name(config)),
        ResumePoint(initial_state(config, model, test, start)),
    )
    if resumed:
        point = after_interruption(config, method, point, folder)
    _log.info("LaLoRA %s", folder_text(folder.path))
    folder.write_json("clients.json", {"clients": len(clients.nodes)})
    if clients.simulated and config.data.label_column != NONE:
        folder.write_json("partition.json", _partition(config, len(clients.nodes)))
    kind = STRATEGIES[config.secure_aggregation, config.privacy.noise_share]
    strategy = kind(config, method, folder.name, clients, point.state, point.epsilon_spent)
    after_round = AfterRound(config, folder, strategy, model, test, point.rows, began, tasks)
    try:
        _train(grid, strategy, after_round)
    except Exception as error:
        folder.write_json("summary.json", {"method": config.method, "status": f"failed: {error}"})
        raise


def serve(grid: Grid, run_config: Mapping[str, Any], settle: float) -> None:
    """Run a flat config, or the comparison that it names; log the reason of a failure.

    Args:
        grid: connection to the clients.
        run_config: the app's flat run config.
        settle: seconds for which the list of nodes must stay the same before the run starts.
    """
    try:
        config = parse(run_config)
        if config.compare == NONE:
            run(grid, config, settle)
        else:
            run_plan(grid, config.compare, run_config, run, settle)
    except ConfigError as error:  # no traceback: the message says everything
        _log.error("LaLoRA: %s", error)
        raise ConfigError(str(error)) from None
    except Exception as error:
        _log.error("LaLoRA: %s: %s", type(error).__name__, first_line(error))
        raise


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point."""
    serve(grid, context.run_config, SETTLE_SECONDS)
