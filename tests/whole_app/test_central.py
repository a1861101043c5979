"""A run with ``central = true``: one simulated client holds the whole training split."""

import numpy as np
import pytest

from helpers.app_runs import (
    DELTA,
    EPSILON,
    INF,
    by_dataset,
    crash_before,
    interrupted,
    ledger_entries,
    open_run,
    run,
    sized,
)
from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.client.site import admit
from lalora_app.data.examples import split
from lalora_app.methods.compatibility import CENTRAL, method_of
from lalora_app.privacy.accounting import epsilon
from lalora_app.server.before_start import check_data
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.run_config import flatten

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
ALONE = {"central": True, "min-clients": 1, "min-replies": 1}


def test_one_of_several_nodes_trains_on_all_examples_at_the_runs_epsilon(tiny):
    config = tiny(**sized(1, **ALONE))
    done = run(config, 4)
    assert len({e.partition for e in done.grid.exchanges}) == 1  # no other node is asked
    assert len(done.grid.trained()) == 3
    assert done.json("clients.json") == {"clients": 1}
    train = split(config.data)[0]
    assert sum(map(sum, done.json("partition.json")["clients"])) == len(train)
    ((dataset, entries),) = by_dataset(ledger_entries()).items()
    assert dataset.startswith(f"simulated {config.data.name} ")
    releases = [entry.release for entry in entries]
    assert {r.sampling_rate for r in releases} == {config.train.batch_size / len(train)}
    assert 0.98 * EPSILON < epsilon(releases, DELTA) <= EPSILON


def test_it_is_the_run_of_a_single_client_who_is_dealt_everything(tiny):
    """Without noise and sampling, the order of the examples is the only difference."""
    size = len(split(tiny(**open_run(1)).data)[0])
    exact = {"privacy.clip-norm": INF, "train.batch-size": size, "train.optimizer": "sgd"}
    keys = open_run(1, method="dp-lora", **exact | {"data.partitioner": "iid"})
    keys |= {"min-clients": 1, "min-replies": 1}
    adapters = []
    for name, nodes, own in (("one", 1, {}), ("central", 3, ALONE)):
        output = {"output": f"{tiny().output}-{name}"}
        adapters.append(run(tiny(**keys | own | output), nodes).folder.latest().adapter)
    one, central = adapters
    assert one.keys() == central.keys()
    for name in one:
        assert np.allclose(one[name], central[name], atol=1e-5), name


def test_every_node_would_hold_the_same_data_under_the_same_name(tiny):
    config = tiny(**ALONE)
    sites = [admit(config, {"partition-id": i, "num-partitions": 3}, 7) for i in range(3)]
    assert len({(site.client, site.dataset) for site in sites}) == 1
    assert {len(site.load()) for site in sites} == {len(split(config.data)[0])}
    plain = admit(tiny(), {"partition-id": 0, "num-partitions": 1}, 7)
    assert plain.dataset != sites[0].dataset


def test_an_interrupted_run_goes_on_with_its_one_client(tiny):
    config = tiny(**open_run(1, **ALONE))
    first, later = interrupted(config, 2, before=crash_before(2))
    server_app.run(FakeGrid(later, 3), later)
    assert [row["attempt"] for row in first.folder.history()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("min-clients", 2), ("min-replies", 2), ("robust", "median")),
        *(("weighting", "public-size"), ("lora.ranks", "1,2")),
    ],
)
def test_what_needs_several_clients_is_refused(tiny, key, value):
    assert key in CENTRAL
    config = tiny(method="flora" if key == "lora.ranks" else "dp-lora", **ALONE | {key: value})
    with pytest.raises(ConfigError, match=f"^{key}=.* must be .* for central=true") as caught:
        method_of(config)
    assert "\n" not in str(caught.value)


def test_secure_aggregation_is_refused(tiny):
    config = tiny(**ALONE | {"secure-aggregation": "secagg+"})
    told = r'^secure-aggregation="secagg\+" must be "none" for central=true'
    with pytest.raises(ConfigError, match=told):
        method_of(config)


def test_a_site_with_its_own_data_refuses_before_anything_is_spent(tiny, tiny_data):
    config = tiny(**sized(1, **ALONE))
    node = {"data-path": tiny_data, "max-epsilon": 9.0, "delta": DELTA}
    with pytest.raises(DataError, match=r"^central=true must be false at a site"):
        admit(config, node, 1)
    grid = FakeGrid(config, [node, node])
    told = "central=True must be false at a site with its own data"
    with pytest.raises(ConfigError, match=told):
        server_app.run(grid, config)
    assert grid.trained() == []
    assert ledger_entries() == []


def test_several_nodes_are_refused_before_the_start_and_one_is_checked_with_all_data(tiny):
    config = tiny(**ALONE)
    with pytest.raises(ConfigError, match=r"^central=true must be false for --nodes 3"):
        check_data(config, 3)
    assert check_data(config, 1).sizes == [len(split(config.data)[0])]


def test_a_batch_above_one_part_is_possible_for_the_whole_split(tiny):
    size = len(split(tiny().data)[0])
    config = tiny(**ALONE | {"train.batch-size": size, "privacy.epsilon": INF})
    assert check_data(config, 1).sizes == [size]
    assert flatten(config)["central"] is True
