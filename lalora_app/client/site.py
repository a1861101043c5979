"""One client as its node config describes it: data, name, rank and policy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lalora_app.data.examples import Examples, check_client
from lalora_app.data.examples import private_file as read_private_file
from lalora_app.data.labels import is_integer, listed
from lalora_app.data.partition import CLIENT_NAME, deal_name, partition
from lalora_app.methods.compatibility import checked_rank
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.privacy.policy import Policy, PolicyError, read_policy
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import AUTO, NONE, full_path
from lalora_app.settings.run_config import Config, Data, flatten
from lalora_app.settings.value_rules import CLASSES_LAW, are_classes, class_names_in

# A site's own columns, with the app's defaults. If the server chose them, or the class names, a
# refusal would reveal, without noise or ledger, whether a column holds the server's labels.
_COLUMNS = {"input-column": "text", "label-column": "label"}
_NUM_LABELS = 2
_LABELS = ("labels", "num-labels")


@dataclass(frozen=True)
class Site:
    """One client.

    Attributes:
        client: the client's name, the same in every round.
        dataset: the name of its data in the ledger.
        rank: the rank of its adapter.
        policy: the limits that the site sets for runs.
        state: the folder of its ledger and of its files between rounds.
        load: a function that reads its examples.
        cache: the folder for encoded examples, and the path of the data; None: no cache.
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
        """Return the client's examples.

        Raises:
            DataError: if they cannot take part in the run.
        """
        examples = self.load()
        self.require_size(len(examples), config)
        return examples

    def require_size(self, size: int, config: Config) -> None:
        """Check that a client of ``size`` examples can keep to the run's batch size and δ.

        Raises:
            DataError: if it cannot.
        """
        batch_size, delta = config.train.batch_size, config.privacy.delta
        check_client(size, batch_size=batch_size, delta=delta)


def _rank(config: Config, node: Mapping[str, object]) -> int:
    """Return the rank in the node config, or the client's turn in ``lora.ranks``."""
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
    return name, dataset, lambda: read_private_file(path, _own_classes(config, node))


def _simulated(config: Config, node: Mapping[str, object]) -> SiteData:
    data, seed = config.data, config.seed
    index, clients = int(str(node["partition-id"])), int(str(node["num-partitions"]))
    dataset = f"simulated {data.name} {deal_name(data, seed)} {index}/{clients}"
    return CLIENT_NAME.format(index), dataset, lambda: partition(data, seed, clients)[index]


def _data(config: Config, node: Mapping[str, object], node_id: int) -> SiteData:
    """Return this node's own file, or its part of the simulated split as on Flower Hub."""
    if "data-path" in node:
        return _own(config, node, node_id)
    if "partition-id" in node and "num-partitions" in node:
        return _simulated(config, node)
    raise ConfigError("node config must have data-path, or partition-id and num-partitions")


def _own_value(node: Mapping[str, object], key: str, default: str | int) -> Any:
    value, kind = node.get(key, default), type(default)
    if type(value) is not kind:
        wanted = "a name" if kind is str else "an integer"
        raise ConfigError(f"node config {key}={value!r} must be {wanted}")
    return value


def _require_equal(key: str, wanted: object, own: object) -> None:
    if wanted != own:
        raise PolicyError(
            f"data.{key}={json.dumps(wanted)} must be {json.dumps(own)}, "
            "the value in the node config"
        )


def _check_columns(config: Config, node: Mapping[str, object]) -> None:
    """Check that a run names the same columns of a node's own data as the node config."""
    if "data-path" not in node:
        for key in {*_COLUMNS, *_LABELS} & node.keys():
            raise ConfigError(f"node config {key} needs data-path")
        return
    asked = flatten(config)
    for key, default in _COLUMNS.items():
        _require_equal(key, asked[f"data.{key}"], _own_value(node, key, default))
    _own_classes(config, node)


def _own_classes(config: Config, node: Mapping[str, object]) -> Data:
    """Return how a site's own labels are read: the run's classes, in the run's order.

    Raises:
        ConfigError: if the node config names no classes that fit each other.
        PolicyError: if the run has other classes than the node config.
    """
    data = config.data
    if data.label_column == NONE:
        return data
    names = data.class_names
    if "labels" not in node:
        count = _own_value(node, "num-labels", _NUM_LABELS)
        _require_equal("num-labels", data.num_labels, count)
        own = tuple(map(str, range(count)))
        if any(map(is_integer, names)) and set(names) != set(own):
            raise PolicyError(
                f"data.labels={json.dumps(data.labels)} must be the integers from 0 to "
                f"{count - 1}, as the node config has no labels"
            )
        integers = names if set(names) == set(own) else own
        return replace(data, labels=listed(integers))
    text = _own_value(node, "labels", "")
    if not are_classes(text) or text == AUTO:
        raise ConfigError(f"node config labels={text!r} {CLASSES_LAW}")
    own = class_names_in(text)
    if "num-labels" in node and _own_value(node, "num-labels", 0) != len(own):
        raise ConfigError(
            f"node config num-labels={node['num-labels']} must be {len(own)}, as labels"
        )
    if set(names) != set(own):
        raise PolicyError(
            f"data.labels={json.dumps(data.labels)} must be the names {json.dumps(text)}, "
            "the value in the node config"
        )
    return data


def _cache(node: Mapping[str, object]) -> tuple[Path, str] | None:
    if "data-cache" not in node:
        return None
    if "data-path" not in node:
        raise ConfigError("node config data-cache needs data-path")
    return full_path(str(node["data-cache"])), str(node["data-path"])


def admit(config: Config, node: Mapping[str, object], node_id: int) -> Site:
    """Return this client after checking its policy; neither data nor model is loaded yet.

    Args:
        config: the run's config.
        node: the node config.
        node_id: the number that names a client without a name of its own.

    Raises:
        ConfigError: if the node config breaks a law.
        PolicyError: if the run is outside the policy, or names other columns of own data.
    """
    client, dataset, load = _data(config, node, node_id)
    policy = read_policy(node, config.privacy.delta, config.data.public_size, dataset)
    policy.check_run(config)
    _check_columns(config, node)
    rank, state = _rank(config, node), state_folder(node)
    return Site(client, dataset, rank, policy, state, load, _cache(node))
