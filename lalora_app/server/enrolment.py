"""Find a run's clients: wait for nodes, ask names, ranks and model hashes, plan the cohorts."""

import logging
import time
from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lalora_app.data.partition import CLIENT_NAME
from lalora_app.methods.compatibility import checked_rank
from lalora_app.server.cohorts import Clients, planned_cohorts
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, clients_per_round, flatten
from lalora_app.wire import messages, refusals, tensors
from lalora_app.wire.same_model import check_same_model

_log = logging.getLogger("flwr")

POLL_SECONDS = 1.0  # between two requests for the list of nodes
SETTLE_SECONDS = 3.0  # for which the list of nodes must stay the same


def _wait_for_nodes(grid: Grid, config: Config, settle: float) -> list[int]:
    """Return the connected nodes, once at least ``min-clients`` are there and no new one comes.

    Raises:
        ConfigError: if fewer are connected after ``node-timeout`` seconds.
    """
    deadline = time.monotonic() + config.node_timeout
    seen: set[int] = set()
    since = time.monotonic()
    while True:
        now, nodes = time.monotonic(), set(grid.get_node_ids())
        since = since if nodes == seen else now
        seen = nodes
        if len(nodes) >= config.min_clients and now - since >= settle:
            return sorted(nodes)
        if now > deadline:
            raise ConfigError(
                f"min-clients={config.min_clients} must be at most the number of SuperNodes, "
                f"which is {len(nodes)} after node-timeout={config.node_timeout} s"
            )
        time.sleep(POLL_SECONDS)


def _refusal(error: refusals.RefusedError, config: Config) -> str:
    """Return a client's refusal with the run's value; the client names the key only."""
    values = flatten(config)
    return f"{error.key}={values[error.key]!r} {error.law}" if error.key in values else str(error)


def _require_new(name: str, names: Iterable[str]) -> None:
    if name in names:
        raise tensors.WireError(f"two clients have the same name {name}")


def _ask_names(
    grid: Grid, config: Config, nodes: list[int], model: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Query every node; return (node id, rank) by the client's name.

    Every refusal is logged. A query spends no privacy budget.

    Raises:
        ConfigError: if a client refuses, or fewer than ``min-clients`` answer.
    """
    run = messages.run_config(flatten(config))
    content = RecordDict({messages.CONFIG: ConfigRecord(), messages.RUN_CONFIG: run})
    queries = [Message(content, dst_node_id=node, message_type="query") for node in nodes]
    names: dict[str, tuple[int, int]] = {}
    reasons: list[str] = []
    for reply in grid.send_and_receive(queries, timeout=config.round_timeout):
        try:
            hello = messages.parse_hello(reply)
            _require_new(hello.client, names)
            check_same_model(hello.client, hello.model, model)
            names[hello.client] = reply.metadata.src_node_id, checked_rank(hello.rank, config)
        except refusals.RefusedError as error:
            reasons.append(_refusal(error, config))
        except (tensors.WireError, ConfigError) as error:
            reasons.append(str(error))
    for reason in sorted(set(reasons)):
        _log.error("LaLoRA %d of %d clients: %s", reasons.count(reason), len(nodes), reason)
    if reasons or len(names) < config.min_clients:
        raise ConfigError(
            f"{len(names)} of {len(nodes)} clients can take part; at least min-clients="
            f"{config.min_clients} must, and none may refuse: "
            + ("; ".join(sorted(set(reasons))) or "the others did not answer")
        )
    return names


def find_clients(grid: Grid, config: Config, settle: float, model: Mapping[str, str]) -> Clients:
    """Return the clients of a run and the cohort of each round.

    Args:
        grid: connection to the clients.
        config: checked config of the run.
        settle: seconds for which the list of nodes must stay the same.
        model: part of the base model -> SHA-256 at the server; every site must have the same.

    Raises:
        ConfigError: if too few clients can take part or one refuses, or if ``min-replies`` is above
            the number of clients per round.
    """
    nodes = _wait_for_nodes(grid, config, settle)
    if config.central:  # any simulated node can hold the whole split; no other is asked
        nodes = nodes[:1]
    clients = _ask_names(grid, config, nodes, model)
    names = sorted(clients)
    per_round = clients_per_round(config.fraction_train, len(names))
    if config.min_replies > per_round:
        raise ConfigError(
            f"min-replies={config.min_replies} must be at most {per_round}, the clients per round"
        )
    return Clients(
        nodes=[clients[name][0] for name in names],
        cohorts=planned_cohorts(config, len(names)),
        simulated=names == [CLIENT_NAME.format(i) for i in range(len(names))],
        ranks=[clients[name][1] for name in names],
        model=model,
    )
