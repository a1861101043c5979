"""A site with another base model takes no part: refused at the query, and in train requests."""

import shutil
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message
from safetensors.torch import load_file, save_file

from helpers.app_runs import ledger_entries, open_run
from helpers.fake_grid import FakeGrid
from lalora_app import client_app, server_app
from lalora_app.models import backbone
from lalora_app.settings.errors import ConfigError
from lalora_app.wire import messages
from lalora_app.wire.same_model import MODEL

pytestmark = pytest.mark.usefixtures("no_waiting")


class OtherSite(FakeGrid):
    """Two sites in one process; the second one finds another model under the run's name.

    Args:
        swap: called before and after the second site answers.
    """

    def __init__(self, config, swap, only_train=False):
        super().__init__(config, 2)
        self.swap, self.only_train = swap, only_train

    def _deliver(self, message, message_id):
        second = self.partitions[message.metadata.dst_node_id] == 1
        if not second or (self.only_train and message.metadata.message_type == "query"):
            return super()._deliver(message, message_id)
        self.swap()
        backbone._by_rank.cache_clear()
        try:
            return super()._deliver(message, message_id)
        finally:
            self.swap()
            backbone._by_rank.cache_clear()


@pytest.fixture
def served(tiny_model, tmp_path):
    """The folder of the run's model: a link, which a swap points at a copy and back."""
    other, link = tmp_path / "other", tmp_path / "model"
    shutil.copytree(tiny_model, other)
    link.symlink_to(tiny_model)

    def swap():
        target = Path(tiny_model) if link.readlink() == other else other
        link.unlink()
        link.symlink_to(target)

    return link, other, swap


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_vocabulary(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"free"', '"cost"'), "utf-8")


CHANGES = {"weights": change_weights, "tokenizer": change_vocabulary}


def test_a_site_with_a_copy_of_the_model_takes_part(tiny, served):
    link, _, swap = served
    config = tiny(**open_run() | {"model.name": str(link)})
    grid = OtherSite(config, swap)
    server_app.run(grid, config)
    assert all(messages.ARRAYS in e.reply.content for e in grid.trained())


@pytest.mark.parametrize("part", list(CHANGES))
def test_another_model_is_refused_before_any_round_naming_site_part_and_hashes(part, tiny, served):
    link, other, swap = served
    CHANGES[part](other)
    config = tiny(**open_run() | {"model.name": str(link)})
    grid = OtherSite(config, swap)
    with pytest.raises(ConfigError) as caught:
        server_app.run(grid, config)
    own = backbone.build(config)[0].fingerprint[part][:12]
    (theirs,) = {e.reply.content[MODEL][part][:12] for e in grid.exchanges if e.partition == 1}
    text = str(caught.value)
    assert "\n" not in text
    wanted = f"{part} {theirs} at the site, {own} at the server"
    assert f'site "partition-000001" must have the base model of the server: {wanted}' in text
    assert theirs != own
    assert ({*CHANGES} - {part}).pop() not in text
    assert grid.trained() == []


@pytest.mark.parametrize("part", list(CHANGES))
def test_a_site_restarted_with_another_model_refuses_at_no_cost(part, tiny, served, caplog):
    link, other, swap = served
    CHANGES[part](other)
    config = tiny(**open_run() | {"model.name": str(link), "min-replies": 1})
    grid = OtherSite(config, swap, only_train=True)
    server_app.run(grid, config)
    refused = [e for e in grid.trained() if e.partition == 1]
    assert len(refused) == config.num_server_rounds
    for exchange in refused:
        assert {n: dict(r) for n, r in exchange.reply.content.items()} == {
            messages.CONFIG: {"refusal": "model"}
        }
    assert len({entry.dataset for entry in ledger_entries()}) == 1  # of the other site
    assert f'site "partition-000001" must have the base model of the server: {part} ' in caplog.text


def test_a_train_request_without_the_servers_model_is_refused_at_no_cost(tiny):
    config = tiny(**open_run())
    grid = FakeGrid(config, 2)
    server_app.run(grid, config)
    before = len(ledger_entries())
    exchange = grid.trained()[-1]
    node = exchange.request.metadata.dst_node_id
    for record in (None, ConfigRecord({"weights": "0" * 63})):
        content = exchange.request.content.copy()
        del content[MODEL]
        if record is not None:
            content[MODEL] = record
        message = Message(content, dst_node_id=node, message_type="train", group_id="1")
        reply = client_app.app(message, grid.contexts[node])
        assert dict(reply.content[messages.CONFIG]) == {"refusal": "request"}
    assert len(ledger_entries()) == before
