"""Divide a dataset among simulated clients, by the partitioners of flwr-datasets."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from lalora_app.data.examples import Examples, split
from lalora_app.settings.errors import DataError, first_line
from lalora_app.settings.names import NONE
from lalora_app.settings.run_config import BY_LABEL, Config, Data

CLIENT_NAME = "partition-{:06d}"  # name of a simulated client, by its index
Maker = Callable[[Data, int, int], Any]  # (data, seed, clients) -> a partitioner


def _iid(data: Data, seed: int, clients: int) -> Any:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(num_partitions=clients)


def _dirichlet(data: Data, seed: int, clients: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    if math.isinf(data.dirichlet_alpha):
        return _iid(data, seed, clients)
    return DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=data.dirichlet_alpha,
        min_partition_size=0,
        self_balancing=False,
        seed=seed,
    )


def _pathological(data: Data, seed: int, clients: int) -> Any:
    from flwr_datasets.partitioner import PathologicalPartitioner

    return PathologicalPartitioner(
        num_partitions=clients,
        partition_by="label",
        num_classes_per_partition=data.classes_per_client,
        class_assignment_mode="first-deterministic",  # others may leave a class unused
        seed=seed,
    )


def _shard(data: Data, seed: int, clients: int) -> Any:
    from flwr_datasets.partitioner import ShardPartitioner

    shards = clients * data.shards_per_client
    return ShardPartitioner(
        num_partitions=clients,
        partition_by="label",
        shard_size=math.ceil(
            len(split(data)[0]) / shards
        ),  # with num_shards it would drop the rest
        keep_incomplete_shard=True,
        seed=seed,
    )


def _natural_id(data: Data, seed: int, clients: int) -> Any:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return NaturalIdPartitioner(partition_by="client")


def _by_size(kind: str, data: Data, seed: int, clients: int) -> Any:
    from flwr_datasets import partitioner

    return getattr(partitioner, kind)(num_partitions=clients)


MAKERS: dict[str, Maker] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "shard": _shard,
    "natural-id": _natural_id,
    "linear": partial(_by_size, "LinearPartitioner"),
    "square": partial(_by_size, "SquarePartitioner"),
    "exponential": partial(_by_size, "ExponentialPartitioner"),
}


def _shuffled(data: Data) -> bool:
    """Tell whether the partitioner keeps the order of examples, so that it must be shuffled."""
    if data.partitioner == "dirichlet":
        return math.isinf(data.dirichlet_alpha)
    return data.partitioner not in (*BY_LABEL, "natural-id")


def _clients_of(groups: tuple[str, ...], data: Data, clients: int) -> list[str]:
    """Return the client of each example; the column's values are given to clients in turn."""
    values = sorted(set(groups))
    if len(values) < clients:
        raise DataError(
            "data.client-column",
            f'="{data.client_column}" has {len(values)} values, and must have at least one for '
            f"each of the {clients} clients",
        )
    turn = {value: f"{i % clients:06d}" for i, value in enumerate(values)}
    return [turn[group] for group in groups]


def _table(train: Examples, data: Data, seed: int, clients: int) -> Any:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {"row": list(range(len(train))), "label": list(train.labels)}
    if train.groups:
        columns["client"] = _clients_of(train.groups, data, clients)
    table = Dataset.from_dict(columns)
    return table.shuffle(seed=seed) if _shuffled(data) else table


@lru_cache(maxsize=8)
def partition(data: Data, seed: int, clients: int) -> tuple[Examples, ...]:
    """Divide the training examples among simulated clients.

    Args:
        data: the dataset and its ``partitioner``: ``dirichlet`` (label skew ``dirichlet-alpha``;
            inf ignores the labels), ``iid``, ``pathological`` (``classes-per-client``),
            ``shard`` (``shards-per-client``), ``natural-id`` (by ``client-column``; with more
            values than clients, several values share a client), ``linear``,
            ``square``, ``exponential`` (sizes grow with the client's number).
        seed: seed of the random partitioners and of the shuffle.
        clients: number of clients; a client may get no examples.

    Raises:
        DataError: if the partitioner cannot divide this data among this number of clients.
    """
    train, _ = split(data)
    if clients > len(train):
        raise DataError(
            "data.partitioner",
            f'="{data.partitioner}" must deal from at least one example per client: there are '
            f"{len(train)} for {clients} clients",
        )
    dealer = MAKERS[data.partitioner](data, seed, clients)
    dealer.dataset = _table(train, data, seed, clients)
    try:
        rows = [dealer.load_partition(i)["row"][:] for i in range(clients)]
    except ValueError as error:
        reason = first_line(error)
        raise DataError("data.partitioner", f'="{data.partitioner}": {reason}') from error
    if (dealt := sum(map(len, rows))) != len(train):
        raise DataError(
            "data.partitioner",
            f'="{data.partitioner}" must deal every example to one of the {clients} clients, and '
            f"deals {dealt} of {len(train)}",
        )
    return tuple(train.take(part) for part in rows)


def clients_data(config: Config, clients: int) -> tuple[Examples, ...]:
    """Return the training examples of each simulated client of a run.

    Args:
        config: the run's config; with ``central`` one client has the whole training split.
        clients: number of clients; without effect on a ``central`` run.

    Raises:
        DataError: if the partitioner cannot divide this data among this number of clients.
    """
    if config.central:
        return (split(config.data)[0],)
    return partition(config.data, config.seed, clients)


def deal_name(data: Data, seed: int) -> str:
    """Return a name of this division of the dataset; different divisions have different names."""
    keys = {
        "dirichlet": f"alpha={data.dirichlet_alpha}",
        "pathological": f"classes={data.classes_per_client}",
        "shard": f"shards={data.shards_per_client}",
        "natural-id": f"column={data.client_column}",
    }
    by = f"by {data.label_column}" if data.partitioner in BY_LABEL else ""
    how = f"{data.partitioner} {by} {keys.get(data.partitioner, '')}"
    return f"{data.subset} {data.train_split} {how} test={_test_name(data)} seed={seed}"


def whole_name(data: Data) -> str:
    """Return a name of the whole training split; different splits have different names."""
    return f"{data.subset} {data.train_split} whole test={_test_name(data)}"


def _test_name(data: Data) -> str:
    share = f"{data.test_fraction} of {data.input_column}"  # by its contents
    return share if data.test_split == NONE else data.test_split


def label_counts(config: Config, clients: int) -> list[list[int]]:
    """Return (clients, labels): the number of examples per client and label."""
    labels = [np.asarray(part.labels, dtype=int) for part in clients_data(config, clients)]
    return [np.bincount(own, minlength=config.data.num_labels).tolist() for own in labels]
