"""How simulated clients come by their data: dealt exactly once, by the seed, as the name says."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import described, make_config
from lalora_app.data import examples as datasets
from lalora_app.data import partition as deals
from lalora_app.data.examples import Examples
from lalora_app.data.partition import MAKERS, deal_name, label_counts, partition
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.run_config import PARTITIONERS, Data

INF = float("inf")
BY_SIZE = ("linear", "square", "exponential")
DEAL = partition.__wrapped__  # past the cache

# flwr-datasets says it too, before our error.
pytestmark = pytest.mark.filterwarnings("ignore:Classes.*will NOT be used:UserWarning")


@pytest.fixture
def holding(monkeypatch):
    """Make the training split what the test says, and the cache of deals empty."""

    def hold(labels, groups=()) -> Examples:
        contents = tuple(f"text {i}" for i in range(len(labels)))
        train = Examples(contents, tuple(labels), tuple(groups), tuple(range(len(labels))))
        monkeypatch.setattr(deals, "split", lambda data: (train, train))
        partition.cache_clear()
        return train

    yield hold
    partition.cache_clear()


def dealt(parts) -> Counter:
    return Counter(row for part in parts for row in zip(part.rows, part.contents, strict=True))


def whole(train: Examples) -> Counter:
    return Counter(zip(train.rows, train.contents, strict=True))


def some_labels(size: int, count: int) -> tuple[int, ...]:
    """``size`` labels in a fixed disorder; every label occurs."""
    return tuple(np.random.default_rng(size).permutation(np.arange(size) % count).tolist())


def some_groups(size: int, count: int) -> tuple[str, ...]:
    return tuple(f"shop {i}" for i in some_labels(size, count))


@pytest.mark.parametrize("clients", [1, 3, 7])
@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_every_example_is_dealt_exactly_once(partitioner, clients, holding):
    # The smallest of 7 exponential clients has 1/1000 of all, and needs an example.
    @given(size=st.integers(1200, 1300), labels=st.integers(2, 7), seed=st.integers(0, 99))
    @settings(max_examples=2, deadline=None, derandomize=True)
    def check(size, labels, seed):
        train = holding(some_labels(size, labels), some_groups(size, 9))
        # With fewer clients than labels, only all of the classes are sure to find an owner.
        classes = labels if clients < labels else 1 + seed % labels
        changes = {"num_labels": labels, "classes_per_client": classes, "dirichlet_alpha": 0.5}
        parts = DEAL(described("x", partitioner=partitioner, **changes), seed, clients)
        assert len(parts) == clients
        assert dealt(parts) == whole(train)

    check()


def test_every_partitioner_of_the_config_has_a_maker_and_no_other_is_taken():
    assert set(PARTITIONERS) == set(MAKERS)
    with pytest.raises(ConfigError) as caught:
        make_config(**{"data.partitioner": "by-mood"})
    assert str(caught.value).startswith("data.partitioner='by-mood' must be one of ")
    assert all(f'"{name}"' in str(caught.value) for name in MAKERS)


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_the_deal_follows_the_seed(partitioner, holding):
    holding(some_labels(300, 5), some_groups(300, 5))
    data = described("x", partitioner=partitioner, num_labels=5, dirichlet_alpha=0.5)
    assert DEAL(data, 1, 5) == DEAL(data, 1, 5)
    natural = partitioner == "natural-id"  # its clients are given, not drawn
    assert (DEAL(data, 1, 5) == DEAL(data, 2, 5)) == natural


@pytest.mark.parametrize("alpha", [INF, 1e9, 0.01])
@pytest.mark.parametrize("clients", [1, 7])
def test_any_alpha_deals_the_train_split_exactly_once(tiny_data, alpha, clients):
    data = described(tiny_data, dirichlet_alpha=alpha)
    parts = partition(data, 0, clients)
    assert len(parts) == clients
    assert dealt(parts) == whole(datasets.split(data)[0])


def shares(parts):
    return np.array([np.mean(part.labels) for part in parts if len(part)])


def test_a_large_alpha_balances_and_a_small_one_skews(tiny_data):
    labels = datasets.split(described(tiny_data))[0].labels
    even = partition(described(tiny_data, dirichlet_alpha=1e9), 0, 4)
    assert np.abs(shares(even) - np.mean(labels)).max() < 0.02
    assert max(map(len, even)) - min(map(len, even)) <= 4
    skewed = partition(described(tiny_data, dirichlet_alpha=0.05), 0, 4)
    assert np.ptp(shares(skewed)) > 0.5


def test_iid_parts_have_equal_sizes_and_mixed_labels(tiny_data):
    parts = partition(described(tiny_data, partitioner="iid"), 0, 4)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    mean = np.mean(datasets.split(described(tiny_data))[0].labels)
    assert np.abs(shares(parts) - mean).max() < 0.2


def test_an_infinite_alpha_is_the_iid_deal(holding):
    holding(some_labels(100, 2))
    iid = described("x", partitioner="iid", dirichlet_alpha=2.0)
    assert DEAL(described("x", dirichlet_alpha=INF), 3, 4) == DEAL(iid, 3, 4)


@pytest.mark.parametrize("partitioner", [p for p in PARTITIONERS if p != "dirichlet"])
def test_alpha_plays_no_part_in_other_deals(partitioner, holding):
    holding(some_labels(300, 5), some_groups(300, 5))
    data = {"partitioner": partitioner, "num_labels": 5}
    one, other = (described("x", dirichlet_alpha=alpha, **data) for alpha in (2.0, INF))
    assert DEAL(one, 0, 5) == DEAL(other, 0, 5)


GROWTH = {"linear": lambda i: i, "square": lambda i: i**2, "exponential": np.exp}


@pytest.mark.parametrize("partitioner", BY_SIZE)
def test_sizes_grow_as_the_name_says(partitioner, holding):
    size, clients = 4000, 5
    holding(some_labels(size, 2))
    sizes = [len(p) for p in DEAL(described("x", partitioner=partitioner), 0, clients)]
    units = [float(GROWTH[partitioner](i)) for i in range(1, clients + 1)]
    for found, unit in zip(sizes[:-1], units, strict=False):
        assert found == int(size * unit / sum(units))
    assert sizes[-1] == size - sum(sizes[:-1])
    assert all(small < large for small, large in pairwise(sizes))


@pytest.mark.parametrize("partitioner", BY_SIZE)
def test_growing_clients_have_mixed_labels(partitioner, holding):
    holding([0] * 500 + [1] * 500)  # sorted by label in the file
    parts = DEAL(described("x", partitioner=partitioner), 0, 3)
    assert np.abs(shares(parts) - 0.5).max() < 0.15


@pytest.mark.parametrize("clients", [1, 3, 7])
def test_natural_clients_keep_their_groups_whole(clients, holding):
    train = holding(some_labels(200, 2), some_groups(200, 9))
    parts = DEAL(described("x", partitioner="natural-id"), 0, clients)
    owners = [set(part.groups) for part in parts]
    assert sum(map(len, owners)) == 9
    assert set().union(*owners) == set(train.groups)
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
    assert dealt(parts) == whole(train)


def test_fewer_natural_clients_than_asked_for_is_an_error(holding):
    holding(some_labels(40, 2), some_groups(40, 3))
    data = described("x", partitioner="natural-id", client_column="shop")
    with pytest.raises(DataError) as caught:
        DEAL(data, 0, 4)
    assert str(caught.value) == (
        'data.client-column="shop" has 3 values, and must have at least one for each of the 4 '
        "clients"
    )
    assert caught.value.key == "data.client-column"


def test_pathological_clients_have_the_asked_number_of_classes(holding):
    train = holding(some_labels(400, 5))
    data = described("x", partitioner="pathological", num_labels=5, classes_per_client=2)
    parts = DEAL(data, 0, 6)
    assert [len(set(part.labels)) for part in parts] == [2] * 6
    assert dealt(parts) == whole(train)


@pytest.mark.parametrize("size", [160, 161, 166, 13])
def test_shards_are_of_few_labels_and_none_is_left(size, holding):
    """Clients get runs of the examples sorted by label: at most two labels a shard of four."""
    train = holding(some_labels(size, 4))
    data = described("x", partitioner="shard", num_labels=4, shards_per_client=2)
    parts = DEAL(data, 0, 4)
    assert dealt(parts) == whole(train)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= 2 * -(-size // 8)
    if size == 160:
        assert sizes == [40] * 4
        assert all(len(set(part.labels)) <= 2 for part in parts)


IMPOSSIBLE = {
    "a class for nobody": (
        {"partitioner": "pathological", "num_labels": 5, "classes_per_client": 2},
        ["pathological", "must deal every example to one of the 2 clients", "of 60"],
    ),
    "more classes than there are": (
        {"partitioner": "pathological", "num_labels": 5, "classes_per_client": 6},
        ["pathological", "num_classes_per_partition", "=6"],
    ),
    "more clients than examples": (
        {"partitioner": "pathological", "num_labels": 5, "classes_per_client": 1},
        ["pathological"],
    ),
    "more shards' clients than examples": ({"partitioner": "shard"}, ["shard"]),
    "more linear clients than examples": (
        {"partitioner": "linear"},
        ["linear", "there are 60 for 80 clients"],
    ),
    "more equal clients than examples": (
        {"partitioner": "iid"},
        ["iid", "there are 60 for 80 clients"],
    ),
    "a smallest client without one": ({"partitioner": "exponential"}, ["exponential", "=20"]),
}
CLIENTS = {
    "more clients than examples": 80,
    "more shards' clients than examples": 80,
    "more linear clients than examples": 80,
    "more equal clients than examples": 80,
    "a smallest client without one": 20,
}


@pytest.mark.parametrize("case", list(IMPOSSIBLE))
def test_a_deal_that_cannot_be_is_one_line(case, holding):
    changes, words = IMPOSSIBLE[case]
    holding(some_labels(60, 5))
    with pytest.raises(DataError) as caught:
        DEAL(described("x", **changes), 0, CLIENTS.get(case, 2))
    message = str(caught.value)
    assert message.startswith(f'data.partitioner="{words[0]}"')
    assert all(word in message for word in words)
    assert "\n" not in message
    assert caught.value.key == "data.partitioner"


def test_an_error_without_a_word_is_still_told(holding, monkeypatch):
    holding(some_labels(60, 5))

    def refuse(index):
        raise ValueError

    silent = SimpleNamespace(load_partition=refuse)
    monkeypatch.setitem(MAKERS, "iid", lambda data, seed, clients: silent)
    with pytest.raises(DataError, match=r'data\.partitioner="iid": ValueError'):
        DEAL(described("x", partitioner="iid"), 0, 2)


def test_more_shards_than_examples_still_deals_each(holding):
    train = holding(some_labels(30, 2))
    data = described("x", partitioner="shard", shards_per_client=100)
    assert dealt(DEAL(data, 0, 4)) == whole(train)


def test_a_client_may_come_out_empty_and_is_then_refused(tiny_data):
    parts = partition(described(tiny_data, dirichlet_alpha=1e-3), 0, 30)
    assert dealt(parts) == whole(datasets.split(described(tiny_data))[0])
    assert not all(map(len, parts))
    with pytest.raises(DataError, match="at least one example") as caught:
        datasets.check_client(0, batch_size=1, delta=1e-5)
    assert caught.value.key == "data"


def test_label_counts_are_counts(tiny_data):
    data = described(tiny_data, dirichlet_alpha=0.3, num_labels=3)  # nobody has the third
    plain = [Counter(part.labels) for part in partition(data, 5, 4)]
    config = replace(make_config(seed=5), data=data)
    found = label_counts(config, 4)
    assert label_counts(replace(config, central=True), 4) == [np.sum(found, axis=0).tolist()]
    assert found == [[count[label] for label in range(3)] for count in plain]
    assert sum(map(sum, found)) == len(datasets.split(data)[0])
    assert not any(counts[2] for counts in found)


# Keys that change who gets what, each in a run where it does.
CHANGES = {
    "subset": ({}, "sst2"),
    "train_split": ({}, "validation"),
    "test_split": ({}, "validation"),
    "test_fraction": ({}, 0.3),
    "input_column": ({}, "sentence"),
    "label_column": ({"partitioner": "dirichlet", "dirichlet_alpha": 0.5}, "y"),
    "label_column of classes": ({"partitioner": "pathological"}, "y"),
    "label_column of shards": ({"partitioner": "shard"}, "y"),
    "partitioner": ({}, "linear"),
    "dirichlet_alpha": ({"dirichlet_alpha": 0.5}, 0.7),
    "classes_per_client": ({"partitioner": "pathological"}, 3),
    "shards_per_client": ({"partitioner": "shard"}, 3),
    "client_column": ({"partitioner": "natural-id"}, "shop"),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_deals_that_differ_have_different_names(case):
    setting, value = CHANGES[case]
    base = described("x", **setting)
    changed = described("x", **setting | {case.split()[0]: value})
    assert deal_name(base, 0) != deal_name(changed, 0)


def test_the_seed_is_part_of_the_name():
    assert len({deal_name(described("x"), seed) for seed in range(5)}) == 5


def test_the_name_follows_from_the_config_and_from_nothing_else():
    assert deal_name(described("x"), 3) == deal_name(described("x"), 3)
    data: Data = described("x", public_size=True)
    assert deal_name(data, 3) == deal_name(described("x"), 3)
