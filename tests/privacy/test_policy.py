"""The client's policy: what it says, how it can be wrong, and what no server gets past it."""

import math
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from conftest import make_config
from helpers.app_runs import do_not_draw_the_report, do_not_wait_for_nodes
from helpers.fake_grid import FakeGrid
from lalora_app import client_app, server_app
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.privacy.policy import PolicyError, read_policy, read_policy_file
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten
from lalora_app.wire import messages

pytestmark = pytest.mark.usefixtures("no_report")
DELTA = 1e-5
GOOD = """
max-epsilon = 8.0
delta = 1e-6
min-noise-multiplier = 0.5
max-rounds = 100
max-rounds-per-day = 20
max-local-steps = 70
methods = ["la-lora", "rolora"]
models = ["demo:all-MiniLM-L6-v2"]
public-size = true
require-secure-aggregation = true

[datasets."ward 7"]
max-epsilon = 2.0
"""


POLICIES = [
    ({}, Limit(math.inf, 1e-6), False),
    ({"max-epsilon": 8, "delta": 1e-7}, Limit(8.0, 1e-7), False),
    ({"max-epsilon": 0.5, "delta": 1e-7, "public-size": True}, Limit(0.5, 1e-7), True),
    ({"delta": 1e-7}, Limit(math.inf, 1e-7), False),
    ({"max-epsilon": math.inf}, Limit(math.inf, 1e-6), False),
]


@pytest.mark.parametrize(("node_config", "limit", "public"), POLICIES)
def test_a_policy_is_what_the_node_says_and_the_runs_delta_otherwise(node_config, limit, public):
    policy = read_policy(node_config, run_delta=1e-6, public=False)
    assert (policy.limit, policy.public_size) == (limit, public)


def test_the_nodes_own_word_on_its_size_wins_over_the_runs():
    assert read_policy({}, 1e-6, public=True).public_size
    assert not read_policy({"public-size": False}, 1e-6, public=True).public_size
    assert read_policy({"public-size": True}, 1e-6, public=False).public_size


def test_no_run_declares_the_size_of_a_nodes_own_data_public():
    own = {"data-path": "/data", "max-epsilon": 8.0, "delta": DELTA}
    assert not read_policy(own, DELTA, public=True).public_size
    assert read_policy({**own, "public-size": True}, DELTA, public=False).public_size


def test_a_size_policy_that_is_no_bool_is_refused_and_not_taken_for_yes():
    with pytest.raises(ConfigError):
        read_policy({"public-size": "false"}, 1e-6, public=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max-epsilon", 0),
        ("max-epsilon", -1.0),
        ("max-epsilon", math.nan),
        ("max-epsilon", "8"),
        ("max-epsilon", True),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
        ("delta", "1e-5"),
    ],
)
def test_a_policy_out_of_range_is_named_in_one_line(key, value):
    with pytest.raises(ConfigError) as caught:
        read_policy({"max-epsilon": 8.0, "delta": 1e-5} | {key: value}, 1e-6, public=False)
    message = str(caught.value)
    assert message.startswith(f"node config {key}=")
    assert str(value) in message
    assert "\n" not in message


def test_a_lifetime_limit_needs_its_own_delta():
    with pytest.raises(ConfigError, match="needs a delta"):
        read_policy({"max-epsilon": 8.0}, 1e-6, public=False)


def test_the_state_folder_is_the_nodes_then_the_environments_then_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("LALORA_HOME", "~/elsewhere")
    assert state_folder({"state-path": "~/own"}) == Path("/home/somebody/own")
    assert state_folder({}) == Path("/home/somebody/elsewhere")
    monkeypatch.delenv("LALORA_HOME")
    assert state_folder({}) == Path("/home/somebody/.lalora")


# --- the file ---------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path):
    def write(text) -> Path:
        path = tmp_path / "policy.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_file_says_all_of_it(policy):
    found = read_policy_file(policy(GOOD))
    assert found.limit == Limit(8.0, 1e-6)
    assert found.public_size
    assert found.min_noise_multiplier == 0.5
    assert (found.max_rounds, found.max_rounds_per_day) == (100, 20)
    assert found.max_local_steps == 70
    assert found.methods == {"la-lora", "rolora"}
    assert found.require_secure_aggregation
    assert found.models == {"demo:all-MiniLM-L6-v2"}


def test_a_dataset_may_have_a_limit_of_its_own(policy):
    path = policy(GOOD)
    assert read_policy_file(path, "ward 7").limit == Limit(2.0, 1e-6)
    assert read_policy_file(path, "ward 8").limit == Limit(8.0, 1e-6)


def test_a_short_file_allows_every_method_and_model_within_its_limit(policy):
    found = read_policy_file(policy("max-epsilon = 1.0\ndelta = 1e-5"))
    assert (found.methods, found.models, found.max_rounds) == (None, None, None)
    assert (found.min_noise_multiplier, found.public_size) == (0.0, False)


@pytest.mark.parametrize(
    ("old", "new", "law"),
    [
        ("max-epsilon = 8.0", "", "max-epsilon is missing"),
        ("delta = 1e-6", "", "delta is missing"),
        ("max-epsilon = 8.0", "max-epsilon = 0", "max-epsilon=0.0 must be greater than 0"),
        ("max-epsilon = 8.0", 'max-epsilon = "8"', "max-epsilon='8' must be a number"),
        ("max-epsilon = 8.0", "max-epsilon = nan", "max-epsilon=nan must be greater than 0"),
        ("delta = 1e-6", "delta = 1.0", r"delta=1.0 must be in \(0, 1\)"),
        ("= 0.5", "= -1", "min-noise-multiplier=-1.0 must be at least 0"),
        ("= 0.5", "= inf", "min-noise-multiplier=inf must be at least 0, and finite"),
        ("= 100", "= 0", "max-rounds=0 must be an integer of at least 1"),
        ("= 20", "= 2.5", "max-rounds-per-day=2.5 must be an integer"),
        ("= 70", "= 0", "max-local-steps=0 must be an integer of at least 1"),
        ("= 20", "= true", "max-rounds-per-day=True must be an integer"),
        ('["la-lora", "rolora"]', "[]", "must be a list of at least one name"),
        ('["la-lora", "rolora"]', '"la-lora"', "methods='la-lora' must be a list"),
        ('["demo:all-MiniLM-L6-v2"]', "[1]", r"models=\[1\] must be a list"),
        ("public-size = true", "public-size = 1", "public-size=1 must be true or false"),
        ("aggregation = true", "aggregation = 1", "aggregation=1 must be true or false"),
        ("max-rounds = ", "max-round = ", "max-round must be one of max-epsilon, delta"),
        ("max-epsilon = 2.0", "max-epsilon = -2.0", "max-epsilon=-2.0 must be greater"),
        ("max-epsilon = 2.0", "epsilon = 2.0", "datasets: epsilon must be one of"),
        ('[datasets."ward 7"]', "[datasets]", "datasets must be tables"),
        ("delta = 1e-6", "delta = ", "must be TOML"),
        ("delta = 1e-6", "delta = " + "[" * 5000, "must be TOML"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_name(policy, old, new, law):
    assert GOOD.count(old) == 1
    path = policy(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=law) as caught:
        read_policy_file(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_file_that_is_missing_or_no_text_is_one_line(policy, tmp_path):
    for path in (tmp_path / "none.toml", policy(b"\xff\xfe"), tmp_path):
        with pytest.raises(ConfigError, match="must be"):
            read_policy_file(path)


def test_a_node_config_names_a_file_or_holds_the_keys_and_not_both(policy):
    path = str(policy(GOOD))
    assert read_policy({"policy": path}, DELTA, public=False, dataset="ward 7").limit.epsilon == 2
    for key in ("max-epsilon", "delta", "public-size"):
        with pytest.raises(ConfigError, match=f"node config {key} must be in the policy file"):
            read_policy({"policy": path, key: True}, DELTA, public=False)


def test_a_node_with_data_of_its_own_sets_a_limit():
    with pytest.raises(
        ConfigError, match="with data-path must have policy, or max-epsilon and delta"
    ):
        read_policy({"data-path": "/data"}, DELTA, public=False)
    open_node = {"data-path": "/data", "max-epsilon": math.inf}
    assert read_policy(open_node, DELTA, public=False).limit == Limit(math.inf, DELTA)


# --- what no server gets past it --------------------------------------------------------------


def sender(honest, path):
    """Run two clients, the second of which has a policy; return a way to send it any message."""
    grid = FakeGrid(honest, [{}, {"policy": str(path)}])
    server_app.run(grid, honest)
    (exchange,) = [e for e in grid.trained(1) if e.partition == 1]
    (node,) = [n for n, index in grid.partitions.items() if index == 1]

    def send(changes, order, kind):
        content = RecordDict(dict(exchange.request.content))
        content[messages.RUN_CONFIG] = messages.run_config({**flatten(honest), **changes})
        content[messages.CONFIG] = messages.ConfigRecord(
            {**exchange.request.content[messages.CONFIG], **order}
        )
        message = Message(content, dst_node_id=node, message_type=kind)
        return client_app.app(message, grid.contexts[node])

    return send


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tiny_keys):
    """A client with a policy, after a run that it allows, and a way to send it any message."""
    folder = tmp_path_factory.mktemp("guarded")
    own = {"num-server-rounds": 1, "min-replies": 1, "output": str(folder / "out")}
    honest = make_config(**(tiny_keys | own))
    path = folder / "policy.toml"
    path.write_text(
        f"max-epsilon = 8.0\ndelta = {DELTA}\nmin-noise-multiplier = 0.3\nmax-rounds = 5\n"
        "max-local-steps = 9\n"
        f"methods = ['la-lora']\nmodels = ['{honest.model.name}']\n",
        "utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LALORA_HOME", str(folder / "home"))
        do_not_wait_for_nodes(patch)
        do_not_draw_the_report(patch)
        yield sender(honest, path)


def kept_files() -> set[Path]:
    """What the clients keep between messages."""
    return set(state_folder({}).rglob("*"))


NEW_RUN = {"run": "la-lora-20260101-000000-abcdef"}
ATTACKS = {
    "epsilon of 1000": ({"privacy.epsilon": 1000.0}, {}, ("policy", "budget")),
    "no noise": ({"privacy.epsilon": math.inf}, {}, ("policy",)),
    "noise that it knows": ({"privacy.noise": "seeded"}, {}, ("policy",)),
    "delta of a half": ({"privacy.delta": 0.5}, {}, ("privacy.delta",)),
    "a million rounds": ({"num-server-rounds": 10**6}, {}, ("policy",)),
    "a billion steps a round": ({"train.local-steps": 10**9}, {}, ("policy",)),
    "more steps than its run has": ({}, {"steps-left": 10**6}, ("request",)),
    "more steps of a task than its run has": ({}, {"task-steps-left": 10**6}, ("request",)),
    "a round after the last": ({}, {"round": 10**6}, ("request",)),
    "another method": ({"method": "dp-lora"}, {}, ("policy",)),
    "another model": ({"model.name": "timm:resnet18"}, {}, ("policy",)),
    "a model on the client's disk": ({"model.name": "../../../etc"}, {}, ("policy",)),
    "a run outside its folder": ({}, {"run": "../../../etc/passwd"}, ("request",)),
    "a clip norm of its own": ({"privacy.clip-norm": math.inf}, {}, ("config",)),
}


@pytest.mark.parametrize("kind", ["train", "query"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_server_that_asks_for_too_much_is_refused_and_nothing_is_spent(guarded, attack, kind):
    changes, order, reasons = ATTACKS[attack]
    ledger = Ledger(state_folder({}) / "ledger.sqlite")
    before, files = ledger.entries(), kept_files()
    reply = guarded(changes, {**NEW_RUN, **order}, kind)
    said = reply.content["config"].get("refusal")
    late = "request" in reasons or "budget" in reasons or "privacy.delta" in reasons
    if kind == "train" or not late:  # a query carries no order, and asks for no budget
        assert said in reasons
    assert messages.ARRAYS not in reply.content
    assert ledger.entries() == before
    assert kept_files() == files  # else a server could fill the disk at no cost


def test_the_same_client_takes_part_in_what_it_allows(guarded):
    ledger = Ledger(state_folder({}) / "ledger.sqlite")
    before = len(ledger.entries())
    reply = guarded({}, {"run": "la-lora-20260101-000000-fedcba"}, "train")
    assert messages.ARRAYS in reply.content
    assert len(ledger.entries()) == before + 1


def test_a_round_that_is_repeated_counts_among_the_rounds_of_its_run(tiny, policy):
    honest = tiny(**{"num-server-rounds": 2, "min-replies": 1, "privacy.epsilon": math.inf})
    send = sender(honest, policy(f"max-epsilon = inf\ndelta = {DELTA}\nmax-rounds = 2\n"))
    ledger = Ledger(state_folder({}) / "ledger.sqlite")
    before, files = ledger.entries(), kept_files()
    another = {"privacy.clip-norm": 0.5}  # round 1 of the same run, and not the same request
    reply = send(another, {}, "train")
    assert reply.content["config"].get("refusal") == "budget"
    assert ledger.entries() == before
    assert kept_files() == files
    assert messages.ARRAYS in send(another, NEW_RUN, "train").content


def test_too_little_noise_is_refused_before_the_ledger(tiny, policy):
    """ε = 8 would need less noise than the site wants, although it is within its budget."""
    config = tiny(**{"num-server-rounds": 1, "min-replies": 1, "privacy.epsilon": 7.0})
    path = policy(f"max-epsilon = 8.0\ndelta = {DELTA}\nmin-noise-multiplier = 5.0\n")
    grid = FakeGrid(config, [{}, {"policy": str(path)}])
    server_app.run(grid, config)
    (reply,) = [e.reply for e in grid.trained(1) if e.partition == 1]
    assert reply.content["config"]["refusal"] == "policy"
    books = {entry.dataset for entry in Ledger(state_folder({}) / "ledger.sqlite").entries()}
    assert [dataset.split()[-1] for dataset in books] == ["0/2"]


def test_a_site_may_send_under_masks_only(tiny, policy):
    path = policy(f"max-epsilon = 8.0\ndelta = {DELTA}\nrequire-secure-aggregation = true\n")
    config = tiny()
    with pytest.raises(ConfigError, match="the client's policy does not allow this run"):
        server_app.run(FakeGrid(config, [{}, {"policy": str(path)}]), config)
    found = read_policy_file(path)
    found.check_run(tiny(**{"secure-aggregation": "secagg+"}))
    with pytest.raises(PolicyError, match='secure-aggregation="none" must be "secagg\\+"'):
        found.check_run(config)


def test_a_refusal_says_what_and_a_client_keeps_why_for_itself(tiny, policy, caplog):
    config = tiny(**{"method": "dp-lora"})
    path = policy(f"max-epsilon = 8.0\ndelta = {DELTA}\nmethods = ['la-lora']\n")
    with pytest.raises(ConfigError, match="the client's policy does not allow this run"):
        server_app.run(FakeGrid(config, [{}, {"policy": str(path)}]), config)
    assert 'method="dp-lora" must be one of la-lora' in caplog.text
    assert PolicyError.__name__ in caplog.text
