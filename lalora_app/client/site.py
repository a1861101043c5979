"""The client's side of the agreement, from its node config: its data, name, rank and policy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lalora_app.data.examples import Examples, check_client
from lalora_app.data.examples import private_file as read_private_file
from lalora_app.data.partition import CLIENT_NAME, deal_name, partition
from lalora_app.methods.compatibility import checked_rank
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.privacy.policy import Policy, PolicyError, read_policy
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import full_path
from lalora_app.settings.run_config import Config, flatten

# What a site says of its own data, by default what the app does. A server that chose would learn
# from a refusal, without noise and on no ledger, whether any column holds labels in its range.
_COLUMNS: dict[str, str | int] = {"input-column": "text", "label-column": "label", "num-labels": 2}


@dataclass(frozen=True)
class Site:
    """One client.

    Attributes:
        client: its name, the same in every round.
        dataset: the name under which the ledger knows its data.
        rank: of its adapter.
        policy: what it allows.
        state: folder of its ledger and of what waits between rounds.
        load: reads its examples.
        cache: folder where they may stay encoded, and their own file or folder; None: nowhere.
    """

    client: str
    dataset: str
    rank: int
    policy: Policy
    state: Path
    load: Callable[[], Examples]
    cache: tuple[Path, str] | None = None

    @property
    def ledger(self) -> Ledger:
        """The client's ledger, made if missing."""
        return Ledger(self.state / "ledger.sqlite")

    def config_at_rank(self, config: Config) -> Config:
        """Return the run's config with this client's own rank."""
        return replace(config, lora=replace(config.lora, rank=self.rank))

    def examples(self, config: Config) -> Examples:
        """Return the client's examples, if they can take part in the run.

        Raises:
            DataError: if they cannot.
        """
        examples = self.load()
        self.require_size(len(examples), config)
        return examples

    def require_size(self, size: int, config: Config) -> None:
        """Check that a client of ``size`` examples can be promised what the run asks for.

        Raises:
            DataError: if it cannot.
        """
        batch_size, delta = config.train.batch_size, config.privacy.delta
        check_client(size, batch_size=batch_size, delta=delta)


def _rank(config: Config, node: Mapping[str, object]) -> int:
    """Return this client's rank: its node's own, or its turn in ``lora.ranks``."""
    turn = [config.lora.rank]
    if config.lora.ranks != "none":
        turn = [int(rank) for rank in config.lora.ranks.split(",")]
    index = int(str(node.get("partition-id", 0)))
    return checked_rank(node.get("rank", turn[index % len(turn)]), config)


SiteData = tuple[str, str, Callable[[], Examples]]  # client, dataset, load


def _own(config: Config, node: Mapping[str, object], node_id: int) -> SiteData:
    path = str(node["data-path"])
    dataset = str(node.get("dataset-id", f"file {full_path(path).resolve()}"))
    name = str(node.get("name", f"node-{node_id}"))
    return name, dataset, lambda: read_private_file(path, config.data)


def _simulated(config: Config, node: Mapping[str, object]) -> SiteData:
    data, seed = config.data, config.seed
    index, clients = int(str(node["partition-id"])), int(str(node["num-partitions"]))
    dataset = f"simulated {data.name} {deal_name(data, seed)} {index}/{clients}"
    return CLIENT_NAME.format(index), dataset, lambda: partition(data, seed, clients)[index]


def _data(config: Config, node: Mapping[str, object], node_id: int) -> SiteData:
    """Find this node's data: its own file, or its part of a simulated deal (Flower Hub's rule)."""
    if "data-path" in node:
        return _own(config, node, node_id)
    if "partition-id" in node and "num-partitions" in node:
        return _simulated(config, node)
    raise ConfigError("node config must have data-path, or partition-id and num-partitions")


def _own_word(node: Mapping[str, object], key: str, default: str | int) -> str | int:
    value = node.get(key, default)
    if type(value) is str and isinstance(default, str):
        return value
    if type(value) is int and isinstance(default, int):
        return value
    kind = "a name" if isinstance(default, str) else "an integer"
    raise ConfigError(f"node config {key}={value!r} must be {kind}")


def _check_columns(config: Config, node: Mapping[str, object]) -> None:
    """Check that a run means by the columns of a node's own data what the node does."""
    if "data-path" not in node:
        for key in _COLUMNS.keys() & node.keys():
            raise ConfigError(f"node config {key} must be beside data-path")
        return
    asked = flatten(config)
    for key, default in _COLUMNS.items():
        wanted, own = asked[f"data.{key}"], _own_word(node, key, default)
        if wanted != own:
            raise PolicyError(
                f"data.{key}={json.dumps(wanted)} must be {json.dumps(own)}, "
                "as the node config says of its data"
            )


def _cache(node: Mapping[str, object]) -> tuple[Path, str] | None:
    if "data-cache" not in node:
        return None
    if "data-path" not in node:
        raise ConfigError("node config data-cache must be beside data-path")
    return full_path(str(node["data-cache"])), str(node["data-path"])


def admit(config: Config, node: Mapping[str, object], node_id: int) -> Site:
    """Return this client, if its policy allows the run. Neither data nor model is loaded yet.

    Args:
        config: of the run.
        node: the node config.
        node_id: names a client that has no name of its own.

    Raises:
        ConfigError: if the node config breaks a law.
        PolicyError: if the run is outside the policy, or wants other columns of own data.
    """
    client, dataset, load = _data(config, node, node_id)
    policy = read_policy(node, config.privacy.delta, config.data.public_size, dataset)
    policy.check_run(config)
    _check_columns(config, node)
    rank, state = _rank(config, node), state_folder(node)
    return Site(client, dataset, rank, policy, state, load, _cache(node))
