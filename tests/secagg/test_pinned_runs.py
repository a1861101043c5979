"""Runs in which every site has pinned the signing keys of the others in its policy."""

import json
from pathlib import Path

import pytest
from flwr.app import ConfigRecord

from helpers.app_runs import fresh, open_run, run
from helpers.fake_grid import FakeGrid
from helpers.secure_runs import CLIENTS, stages_of
from lalora_app import server_app
from lalora_app.privacy.ledger import Ledger
from lalora_app.secagg import masks
from lalora_app.secagg.peers import new_identity, public_text
from lalora_app.settings.errors import ConfigError
from lalora_app.site_files.peer_key import make_peer_key
from lalora_app.wire.messages import RUN_CONFIG
from lalora_app.wire.refusals import REFUSALS

PEERS = REFUSALS["peers"]
pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")

SUM = {
    "method": "rolora",
    "privacy.noise-share": "sum",
    "privacy.epsilon": 8.0,
    "secure-aggregation": "secagg+",
    "num-server-rounds": 2,
    "train.local-steps": 1,
    "train.sampling-rate": 0.1,
    "train.union-size": 1600,
    "train.optimizer": "sgd",
    "min-replies": 3,
}


@pytest.fixture
def sites(tmp_path, tiny_data):
    """Four node configs with data, a signing key and a policy that pins the other three."""

    def build(stranger: int | None = None, **conditions):
        keys = [make_peer_key(tmp_path / f"{i}.pem") for i in range(CLIENTS)]
        lines = [public_text(key) for key in keys]
        if stranger is not None:
            lines[stranger] = public_text(new_identity())
        nodes = []
        for i in range(CLIENTS):
            others = ", ".join(f'"{line}"' for j, line in enumerate(lines) if j != i)
            policy = tmp_path / f"{i}.toml"
            policy.write_text(
                "max-epsilon = 100.0\ndelta = 1e-5\n[shared-noise]\nmax-epsilon-alone = 1000.0\n"
                f"peers = [{others}]\n" + "".join(f"{k} = {v}\n" for k, v in conditions.items())
            )
            nodes.append(
                {
                    "data-path": tiny_data,
                    "dataset-id": f"site-{i}",
                    "name": f"site-{i}",
                    "policy": str(policy),
                    "peer-key": str(tmp_path / f"{i}.pem"),
                    "state-path": str(tmp_path / f"state-{i}"),
                }
            )
        return nodes

    return build


def ledgers(nodes):
    return [Ledger(Path(node["state-path"]) / "ledger.sqlite").entries() for node in nodes]


@pytest.fixture
def config(tiny, tmp_path, monkeypatch):
    return fresh(tiny, tmp_path, monkeypatch, "run", **open_run(CLIENTS) | SUM)


def test_sites_that_know_each_other_complete_a_run(config, sites):
    nodes = sites()
    done = run(config, nodes)
    assert [row["replies"] for row in done.rows] == [4, 4]
    assert [row["dropped"] for row in done.rows] == [[], []]
    for entries in ledgers(nodes):
        assert [entry.round for entry in entries] == [1, 2]
        assert all(0 < entry.alone < entry.release.noise_multiplier for entry in entries)


def releases(config, nodes, told, kind=FakeGrid, **faults):
    """The number of releases at each site, after a run in which no round was aggregated."""
    with pytest.raises(RuntimeError, match=f"no round was aggregated: .*{told}"):
        server_app.run(kind(config, nodes, **faults), config)
    return [len(entries) for entries in ledgers(nodes)]


def test_a_client_that_is_not_pinned_is_refused_by_every_site_and_costs_nothing(config, sites):
    assert releases(config, sites(stranger=3), PEERS)[:3] == [0, 0, 0]


def test_keys_that_the_server_has_exchanged_are_refused_by_every_site(config, sites):
    """The server replaces one site's mask key in the directory, as a man in the middle would."""

    def exchanged(now, partition, reply):
        if "advertise" in stages_of(reply.asked) and partition == 1:
            record = dict(reply.content["advertise"])
            if "mask-key" in record:
                record["mask-key"] = masks.public_key_of(masks.new_private_key())
                reply.content["advertise"] = ConfigRecord(record)
        return reply

    assert releases(config, sites(), PEERS, fault=exchanged) == [0, 0, 0, 0]


def test_a_site_without_a_signature_is_refused_by_every_other_site(config, sites):
    def stripped(now, partition, reply):
        if "advertise" in stages_of(reply.asked) and partition == 1:
            record = {k: v for k, v in reply.content["advertise"].items() if k != "identity"}
            reply.content["advertise"] = ConfigRecord(record)
        return reply

    assert releases(config, sites(), PEERS, fault=stripped) == [0, 0, 0, 0]


def test_a_site_that_asks_for_more_honest_shares_refuses(config, sites):
    found = releases(config, sites(**{"min-honest": 3}), REFUSALS["policy"])  # t - 1 - c = 2
    assert found == [0, 0, 0, 0]


def test_a_site_with_pinned_peers_and_no_key_says_so_before_the_run(config, sites):
    nodes = sites()
    del nodes[2]["peer-key"]
    with pytest.raises(ConfigError, match="3 of 4 clients can take part"):
        server_app.run(FakeGrid(config, nodes), config)
    assert [len(entries) for entries in ledgers(nodes)] == [0, 0, 0, 0]


class OtherConfigGrid(FakeGrid):
    """A server that gives one site other numbers than it gives the others."""

    def push_messages(self, messages):
        changed = list(messages)
        for message in changed:
            if (
                message.metadata.message_type == "train"
                and self.partitions[message.metadata.dst_node_id] == 0
            ):
                text = str(message.content[RUN_CONFIG]["run-config"])
                other = text.replace('"privacy.clip-norm": 1.0', '"privacy.clip-norm": 0.5')
                assert other != text
                message.content[RUN_CONFIG] = ConfigRecord({"run-config": other})
        return super().push_messages(changed)


def test_a_site_that_is_given_other_constants_than_its_peers_refuses(config, sites):
    nodes = sites()
    grid = OtherConfigGrid(config, nodes)
    server_app.run(grid, config)
    assert [len(entries) for entries in ledgers(nodes)] == [0, 2, 2, 2]


class OmittedKeyGrid(FakeGrid):
    """A server that leaves a key out of its messages, and gives one node another value of it."""

    def push_messages(self, messages):
        changed = list(messages)
        for message in changed:
            if RUN_CONFIG in message.content.config_records:
                values = json.loads(str(message.content[RUN_CONFIG]["run-config"]))
                values.pop("privacy.clip-norm", None)
                message.content[RUN_CONFIG] = ConfigRecord({"run-config": json.dumps(values)})
        for node, partition in self.partitions.items():
            other = 0.01 if partition == 0 else 1.0
            self.contexts[node].run_config["privacy.clip-norm"] = other
        return super().push_messages(changed)


def test_a_key_that_is_missing_in_the_message_is_part_of_what_sites_sign(config, sites):
    nodes = sites()
    server_app.run(OmittedKeyGrid(config, nodes), config)
    assert [len(entries) for entries in ledgers(nodes)] == [0, 2, 2, 2]


def test_a_site_that_signs_and_pins_nobody_does_not_train_with_other_constants(config, sites):
    nodes = sites()
    policy = Path(nodes[0]["policy"])
    policy.write_text("\n".join(x for x in policy.read_text().splitlines() if "peers" not in x))
    server_app.run(OtherConfigGrid(config, nodes), config)
    assert [len(entries) for entries in ledgers(nodes)] == [0, 2, 2, 2]
