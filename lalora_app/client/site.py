"""One client as its node config describes it: data, name, rank and policy."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lalora_app.client.own_data import check_columns, own_data
from lalora_app.data.examples import Examples, check_client
from lalora_app.data.examples import private_file as read_private_file
from lalora_app.data.partition import CLIENT_NAME, clients_data, deal_name, whole_name
from lalora_app.data.sources import stamp
from lalora_app.data.task_division import closed_classes, division_of, of_task
from lalora_app.methods.compatibility import checked_rank
from lalora_app.models.pretrained import revision
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.privacy.ledger_entries import WHOLE
from lalora_app.privacy.policy import Policy, read_policy
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.names import full_path
from lalora_app.settings.run_config import Config, Data, flatten
from lalora_app.site_files.peer_key import read_peer_key
from lalora_app.wire.code_version import code_hash

# Prefixes of the keys that decide on the encoding of an example.
_KEYS = (
    "data.",
    "model.name",
    "model.task",
    "model.max-length",
    "model.min-length",
    "model.image-",
    "model.weights",
)
_LIBRARIES = ("transformers", "tokenizers", "pillow")


def fingerprint(config: Config, data_path: str) -> str:
    """Return a SHA-256 of everything that decides on the encoding of a client's own data.

    Args:
        config: the run's config.
        data_path: the path of the client's file or folder.
    """
    keys = {key: value for key, value in flatten(config).items() if key.startswith(_KEYS)}
    libraries = [version(library) for library in _LIBRARIES]
    parts = [code_hash(), libraries, keys, stamp(data_path), revision(config.model.name)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
        data: how its examples are read: the run's table ``data``, with the site's own classes and
            file format where it has own data.
        data_path: the path of its own data; None: its data is part of the simulated split.
        cache: the folder for encoded examples; None: no cache.
        identity: its private signing key, for runs with pinned peers; None: it has none.
        task: the task (from 0) whose examples it trains on; None: all examples.
    """

    client: str
    dataset: str
    rank: int
    policy: Policy
    state: Path
    load: Callable[[], Examples]
    data: Data
    data_path: str | None = None
    cache: Path | None = None
    identity: Ed25519PrivateKey | None = None
    task: int | None = None

    @property
    def ledger(self) -> Ledger:
        """The client's ledger, made if missing."""
        return Ledger(self.state / "ledger.sqlite")

    def config_at_rank(self, config: Config) -> Config:
        """Return the run's config with this client's own rank."""
        return replace(config, lora=replace(config.lora, rank=self.rank))

    def fingerprint(self, config: Config) -> str | None:
        """Return the fingerprint of this client's own data as it is read; None: it has none."""
        if self.data_path is None:
            return None
        read_as = replace(config, data=self.data)  # the site's own classes and file format
        return fingerprint(read_as, self.data_path)

    def in_round(self, config: Config, t: int) -> "Site":
        """Return this client with the task of round ``t`` open, if the run has tasks."""
        return replace(self, task=config.open_task(t)) if config.has_tasks else self

    def closed_classes(self, config: Config) -> tuple[bool, ...]:
        """Return for each class whether its task is closed; nothing if the head is not divided."""
        return () if self.task is None else closed_classes(config, self.task)

    def part(self, config: Config) -> str:
        """Return the name of the open task's examples in the ledger; empty: all examples."""
        return WHOLE if self.task is None else division_of(config).part(self.task)

    def examples(self, config: Config) -> Examples:
        """Return the client's examples, of the open task only.

        Raises:
            DataError: if they cannot take part in the run.
        """
        examples = self.load()
        self.require_size(len(examples), config)  # all of them: a task may have any number
        return examples if self.task is None else of_task(examples, config, self.task)

    def require_size(self, size: int, config: Config) -> None:
        """Check that a client of ``size`` examples can keep to the run's batch size and δ.

        Raises:
            DataError: if it cannot.
        """
        batch_size, delta = config.train.fewest, config.privacy.delta
        check_client(size, batch_size=batch_size, delta=delta)


def _rank(config: Config, node: Mapping[str, object]) -> int:
    """Return the rank in the node config, or the client's turn in ``lora.ranks``."""
    turn = [config.lora.rank]
    if config.lora.ranks != "none":
        turn = [int(rank) for rank in config.lora.ranks.split(",")]
    index = int(str(node.get("partition-id", 0)))
    return checked_rank(node.get("rank", turn[index % len(turn)]), config)


SiteData = tuple[str, str, Callable[[], Examples], Data]  # client, dataset, load, data


def _own(config: Config, node: Mapping[str, object], node_id: int) -> SiteData:
    if config.central:
        raise DataError("central", "=true must be false at a site with its own data")
    path = str(node["data-path"])
    dataset = str(node.get("dataset-id", f"file {full_path(path).resolve()}"))
    name = str(node.get("name", f"node-{node_id}"))
    own = own_data(config, node)
    return name, dataset, lambda: read_private_file(path, own), own


def _simulated(config: Config, node: Mapping[str, object]) -> SiteData:
    data = config.data
    index, clients = int(str(node["partition-id"])), int(str(node["num-partitions"]))
    deal = f"{deal_name(data, config.seed)} {index}/{clients}"
    if config.central:  # the only client that trains, whichever node it is
        index, clients, deal = 0, 1, whole_name(data)
    dataset = f"simulated {data.name} {deal}"
    return CLIENT_NAME.format(index), dataset, lambda: clients_data(config, clients)[index], data


def _data(config: Config, node: Mapping[str, object], node_id: int) -> SiteData:
    """Return this node's own file, or its part of the simulated split as on Flower Hub."""
    if "data-path" in node:
        return _own(config, node, node_id)
    if "partition-id" in node and "num-partitions" in node:
        return _simulated(config, node)
    raise ConfigError("node config must have data-path, or partition-id and num-partitions")


def _data_path(node: Mapping[str, object]) -> str | None:
    return str(node["data-path"]) if "data-path" in node else None


def _cache(node: Mapping[str, object]) -> Path | None:
    if "data-cache" not in node:
        return None
    if "data-path" not in node:
        raise ConfigError("node config data-cache needs data-path")
    return full_path(str(node["data-cache"]))


def _identity(
    config: Config, node: Mapping[str, object], policy: Policy
) -> Ed25519PrivateKey | None:
    """Return the site's private signing key; None if it has none and needs none.

    Raises:
        ConfigError: if the file holds no such key, or the policy pins peers and there is no file.
    """
    if "peer-key" in node:
        return read_peer_key(full_path(str(node["peer-key"])))
    shared = config.privacy.shared
    if shared and policy.shared_noise is not None and policy.shared_noise.peers is not None:
        raise ConfigError("node config must have peer-key: the policy's peers sign their keys")
    return None


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
    client, dataset, load, data = _data(config, node, node_id)
    policy = read_policy(node, config.privacy.delta, config.data.public_size, dataset)
    policy.check_run(config)
    check_columns(config, node)
    rank, state = _rank(config, node), state_folder(node)
    own = _data_path(node), _cache(node), _identity(config, node, policy)
    return Site(client, dataset, rank, policy, state, load, data, *own)
