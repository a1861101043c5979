"""The whole app in process: ServerApp, Strategy, ClientApps, ledgers and results, over FakeGrid.

360 training examples, dealt IID, and an expected batch of 24 over the number of clients give every
client the sampling rate 1/15; three rounds of two steps (or two of three) make six releases. All
private runs here share these numbers, so the accountant calibrates once.
"""

import json
import math
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load_file

from conftest import make_config
from helpers.app_runs import (
    DELTA,
    EPSILON,
    INF,
    RATE,
    TRAIN_SIZE,
    Round,
    Run,
    arrays,
    by_dataset,
    cohorts,
    contents,
    crash_after_training,
    crash_before,
    damage,
    do_not_wait_for_nodes,
    fresh,
    interrupted,
    ledger_entries,
    local_steps,
    lose,
    lose_replies,
    of_kind,
    open_run,
    rounds_of,
    run,
    run_folder,
    same_bits,
    sized,
    sizes_told,
    spied,
    tokens_of,
)
from helpers.fake_grid import FakeGrid, identify, wire_bytes
from lalora_app import client_app, server_app
from lalora_app.adapter.factors import kind
from lalora_app.aggregation.average import federated_averaging
from lalora_app.client import local_round, resident_factors, site
from lalora_app.methods.table import METHODS
from lalora_app.models import backbone
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.run_config import Config, flatten, from_tables, parse
from lalora_app.wire import messages, refusals, tensors

pytestmark = pytest.mark.usefixtures("no_waiting")


# --- the contract of every method -------------------------------------------------------------


@dataclass
class Finished(Run):
    """A run of one method, with its local rounds, and its ledger as the run left it."""

    rounds: list[Round]
    books: dict[str, list]


# One of every kind; the others are "wide".
QUICK = {
    "dp-lora",
    "ffa-lora",
    "rolora",
    "la-lora",
    "la-lora-full",
    "flora",
    "fedsa-lora",
    "sd-lora",
}
WIDE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.wide) for name in METHODS]


@pytest.fixture(scope="module", params=WIDE)
def finished(request, tmp_path_factory, tiny_model, tiny_data):
    """Every method, three rounds of two steps, two clients."""
    folder = tmp_path_factory.mktemp("contract")
    config = make_config(
        **{
            "model.name": tiny_model,
            "model.pooling": "model",
            "model.max-length": 12,
            "data.name": tiny_data,
            "lora.rank": 2,
            "lora.alpha": 2.0,
            "train.local-steps": 2,
            "output": str(folder / "out"),
        }
        | sized(method=request.param),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LALORA_HOME", str(folder / "home"))
        do_not_wait_for_nodes(patch)
        rounds = spied(patch)
        done = run(config)
        books = by_dataset(ledger_entries())
        return Finished(done.config, done.grid, done.folder, rounds, books)


def test_a_reply_holds_exactly_the_synced_factors_and_the_head(finished):
    method = METHODS[finished.config.method]
    for exchange in finished.grid.trained():
        request = exchange.start
        assert {kind(name) for name in request} - {"gate", "fixed"} == {"A", "B", "head"}
        sent, t = arrays(exchange.reply), exchange.order["round"]
        wanted = method.sent(t, last=t == 3) | {"head", "gate"}
        assert set(sent) == {name for name in request if kind(name) in wanted}
        assert any(sent[name].tobytes() != request[name].tobytes() for name in sent)
    assert [e.order["round"] for e in finished.grid.trained()] == [1, 1, 2, 2, 3, 3]


def test_a_round_starts_from_the_server_and_the_clients_own_resident_factors(finished):
    method, previous = METHODS[finished.config.method], {}
    for exchange, local in zip(finished.grid.trained(), finished.rounds, strict=True):
        server = exchange.start
        own = method.resident(local.t - 1, 2) if local.t > 1 else frozenset()
        for which in ("A", "B", "head"):
            source = previous[exchange.partition] if which in own else server
            assert same_bits(of_kind(local.start, which), of_kind(source, which)), (local.t, which)
            if which in own:
                assert not same_bits(of_kind(source, which), of_kind(server, which))
        previous[exchange.partition] = local.result


def test_what_a_round_does_not_sync_stays_bit_identical(finished):
    method = METHODS[finished.config.method]
    if method.aggregate is not federated_averaging:
        pytest.skip(
            "its server rule moves what did not travel too: tests/aggregation/test_rules.py"
        )
    states = [finished.grid.trained(attempt)[0].start for attempt in (1, 2, 3)]
    states.append(finished.folder.latest().adapter)
    for t in (1, 2, 3):
        before, after = states[t - 1], states[t]
        for name in before:
            moves = kind(name) in method.sent(t, last=t == 3) | {"head"}
            assert (before[name].tobytes() != after[name].tobytes()) == moves, (t, name)
    never = {"A", "B"} - set().union(*(method.sent(t, last=t == 3) for t in (1, 2, 3)))
    for name in states[0]:
        if kind(name) in never:
            assert states[0][name].tobytes() == finished.adapter[name].tobytes()


def test_the_ledger_counts_every_step_of_every_client(finished):
    assert len(finished.books) == 2
    for dataset, entries in finished.books.items():
        assert dataset.startswith(f"simulated {finished.config.data.name} ")
        assert [entry.round for entry in entries] == [1, 2, 3]
        assert {entry.run for entry in entries} == {finished.folder.name}
        releases = [entry.release for entry in entries]
        assert sum(r.count for r in releases) == 3 * finished.config.train.local_steps
        assert {r.sampling_rate for r in releases} == {RATE}
        assert len({r.noise_multiplier for r in releases}) == 1
        assert 0.98 * EPSILON < epsilon(releases, DELTA) <= EPSILON


def test_reported_epsilons_are_the_ledgers(finished):
    release = next(iter(finished.books.values()))[0].release
    rows = [
        epsilon([Release(release.sampling_rate, release.noise_multiplier, 2 * t)], DELTA)
        for t in (1, 2, 3)
    ]
    rounded = [math.ceil(spent * 100) / 100 for spent in rows]
    assert [row["epsilon_max"] for row in finished.rows] == rounded
    for exchange in finished.grid.trained():
        spent = exchange.reply.content["metrics"]["epsilon"]
        assert spent == rounded[exchange.order["round"] - 1]


def test_the_results_are_all_there(finished):
    folder = finished.folder
    assert {path.name for path in folder.path.iterdir()} == {
        *("config.toml", "clients.json", "history.jsonl", "privacy.json", "summary.json"),
        *("partition.json", "report.html", "checkpoints", "adapter"),
    }
    saved = tomllib.loads((folder.path / "config.toml").read_text("utf-8"))
    assert from_tables(saved) == flatten(finished.config)
    summary = finished.json("summary.json")
    assert set(summary) == {
        *("method", "rounds", "accuracy", "balanced_accuracy", "epsilon_max", "delta"),
        *("upload_bytes_per_round", "download_bytes_per_round", "seconds", "status"),
    }
    last = finished.rows[-1]
    expected = {
        "method": finished.config.method,
        "rounds": 3,
        "accuracy": last["accuracy"],
        "balanced_accuracy": last["balanced_accuracy"],
        "epsilon_max": last["epsilon_max"],
        "delta": DELTA,
        "status": "completed",
    }
    assert {key: summary[key] for key in expected} == expected
    assert 0 <= summary["accuracy"] <= 1
    privacy = finished.json("privacy.json")
    assert privacy["private"] is True
    assert (privacy["epsilon_max"], privacy["epsilon_promised"]) == (last["epsilon_max"], EPSILON)
    assert [row["attempt"] for row in finished.rows] == [1, 2, 3]
    state = folder.latest()
    assert (state.round, state.attempts) == (3, 3)
    if METHODS[finished.config.method].effective is None and not state.drift:
        assert same_bits(finished.adapter, state.adapter)


def test_byte_counts_are_those_of_the_traffic(finished):
    def size(message):
        records = message.content.array_records.values()
        return sum(4 * array.numpy().size for record in records for array in record.values())

    summary = finished.json("summary.json")
    exchanges = finished.grid.trained()
    for row in finished.rows:
        asked = finished.grid.trained(row["attempt"])
        assert {size(e.request) for e in asked} == {row["download_bytes"]}
        assert {size(e.reply) for e in asked} == {row["upload_bytes"]}
    up = sum(size(e.reply) for e in exchanges) / len(exchanges)
    down = sum(size(e.request) for e in exchanges) / len(exchanges)
    assert summary["upload_bytes_per_round"] == pytest.approx(up)
    assert summary["download_bytes_per_round"] == pytest.approx(down)


def test_nothing_but_the_last_replies_waits_on_the_clients_after_the_last_round(finished):
    home = finished.folder.path.parents[1] / "home"
    files = {path for path in home.rglob("*") if path.is_file()} - {home / "ledger.sqlite"}
    assert {path.parent for path in files} == {home / "replies"}
    assert len(files) == len(finished.grid.contexts)
    kept = [load_file(path) for path in files]
    sent = [arrays(exchange.reply) for exchange in finished.grid.trained(3)]
    assert all(any(same_bits(one, other) for other in sent) for one in kept)


# --- the local step ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"train.optimizer": "adamw", "train.momentum": 0.0, "train.weight-decay": 0.1},
        {"train.optimizer": "sgd", "train.momentum": 0.9, "train.weight-decay": 0.1},
    ],
)
@pytest.mark.parametrize(("resting", "active"), [("A", "B"), ("B", "A")])
def test_a_resting_factor_and_its_moments_stay_bit_identical(tiny, settings, resting, active):
    config = tiny(**settings)
    model, start = backbone.build(config)
    model.load({name: array + 0.5 for name, array in start.items()})
    optimizer = local_round.make_optimizer(model, local_steps(config), 0.0)
    parameters = model.engine.parameters

    def step(*kinds):
        grads = {n: torch.full_like(p, 0.3) for n, p in parameters.items() if kind(n) in kinds}
        local_round.apply(model, optimizer, NoisedGrads(grads))

    def moments():
        return {
            name: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
            for name, p in parameters.items()
            if kind(name) == resting
        }

    step("A", "B", "head")  # fills the moments of both
    before, kept = model.adapter(), moments()
    assert all(kept.values())
    step(active, "head")
    step(active, "head")
    after = model.adapter()
    for name in before:
        assert (before[name].tobytes() == after[name].tobytes()) == (kind(name) == resting), name
    for name, values in moments().items():
        assert all(torch.equal(kept[name][key], value) for key, value in values.items())


def plain_peft(config: Config, adapter):
    """A PEFT model made without the app's code, holding ``adapter``."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    settings = LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=2.0, target_modules=["query", "value"]
    )
    model = get_peft_model(base, settings).eval()
    set_peft_model_state_dict(model, {n: torch.from_numpy(a) for n, a in adapter.items()})
    return model


def peft_state(model):
    from peft import get_peft_model_state_dict

    return {n: p.detach().numpy().copy() for n, p in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize(("method", "steps"), [("dp-lora", 1), ("la-lora-no-filter", 2)])
def test_one_client_without_noise_is_plain_central_training(tiny, method, steps):
    rates = {"A": 0.7, "B": 0.9, "head": 0.5}
    config = tiny(
        method=method,
        **{
            "data.test-fraction": 0.11,
            "data.dirichlet-alpha": INF,
            "privacy.epsilon": INF,
            "privacy.clip-norm": INF,
            "min-clients": 1,
            "min-replies": 1,
            "num-server-rounds": 3,
            "train.local-steps": steps,
            "train.batch-size": TRAIN_SIZE,
            "train.micro-batch": 100,
            "train.optimizer": "sgd",
            "train.momentum": 0.0,
            "train.weight-decay": 0.0,
            "train.lr-a": rates["A"],
            "train.lr-b": rates["B"],
            "train.lr-head": rates["head"],
            "train.lr-decay": 0.8,
        },
    )
    done = run(config, 1)
    exchanges = done.grid.trained()
    start = exchanges[0].start
    model = plain_peft(config, start)
    inputs, labels = tokens_of(config, 0)
    assert len(labels) == TRAIN_SIZE
    named = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert set(named) == set(start)
    for exchange in exchanges:
        t = exchange.order["round"]
        for k in range(steps):
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()
            with torch.no_grad():
                for name, parameter in named.items():
                    if kind(name) in METHODS[method].trains(t, k) | {"head"}:
                        parameter -= rates[kind(name)] * 0.8 ** (t - 1) * parameter.grad
        central = peft_state(model)
        for name, array in arrays(exchange.reply).items():
            np.testing.assert_allclose(array, central[name], rtol=2e-4, atol=2e-6, err_msg=name)
    moved = max(np.abs(central[name] - start[name]).max() for name in start)
    assert moved > 0.05


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_peft_loads_the_adapter_and_scores_the_same(tiny, pooling):
    import transformers
    from peft import PeftModel

    config = tiny(
        **open_run(method="dp-lora")
        | {
            "model.pooling": pooling,
            "train.local-steps": 4,
            "train.batch-size": 60,
            "train.lr-b": 0.05,
            "train.lr-head": 0.1,
        },
    )
    done = run(config)
    auto = {
        "model": "AutoModelForSequenceClassification",
        "mean": "AutoModelForTokenClassification",
    }
    base = getattr(transformers, auto[pooling]).from_pretrained(config.model.name, num_labels=2)
    inputs, labels = tokens_of(config, 1)

    def accuracy(model):
        with torch.no_grad():
            out = model.eval()(**inputs).logits
        if pooling == "mean":
            mask = inputs["attention_mask"].unsqueeze(-1)
            out = (out * mask).sum(1) / mask.sum(1)
        return (out.argmax(1) == labels).float().mean().item()

    initial = accuracy(base)
    trained = accuracy(PeftModel.from_pretrained(base, done.folder.adapter))
    assert trained == pytest.approx(done.json("summary.json")["accuracy"], abs=1e-6)
    assert trained != pytest.approx(initial, abs=1e-6)
    card = (done.folder.adapter / "README.md").read_text("utf-8")
    assert auto[pooling] in card
    assert "Not private" in card


# --- resident factors -------------------------------------------------------------------------


def test_la_lora_goes_on_from_its_own_resident_factor(tiny, rounds):
    done = run(tiny(**open_run()))
    first, second, third = rounds_of(done, rounds, 1)
    server = second[0].start
    own_a, server_a = of_kind(first[1].result, "A"), of_kind(server, "A")
    assert same_bits(of_kind(second[1].start, "A"), own_a)
    assert not same_bits(own_a, server_a)
    for which in ("B", "head"):  # travelled in round 1: the server's mean
        assert same_bits(of_kind(second[1].start, which), of_kind(server, which))
    # Round 3 trains on from the resident B of round 2, and the A that was aggregated in round 2.
    server = third[0].start
    assert same_bits(of_kind(third[1].start, "B"), of_kind(second[1].result, "B"))
    assert not same_bits(of_kind(third[1].start, "B"), of_kind(server, "B"))
    assert same_bits(of_kind(third[1].start, "A"), of_kind(server, "A"))


def test_a_resident_factor_that_was_aggregated_meanwhile_is_dropped(tiny, rounds):
    config = tiny(**open_run(4) | {"fraction-train": 0.5, "seed": 1})
    done = run(config, 4)
    third = done.grid.trained(3)
    returning = {e.partition for e in third} & {e.partition for e in done.grid.trained(1)}
    assert returning  # asked in rounds 1 and 3, so their A of round 1 is older than round 2
    for partition in returning:
        first, last = rounds_of(done, rounds, partition)
        server = last[0].start
        assert not same_bits(of_kind(first[1].result, "A"), of_kind(server, "A"))
        assert same_bits(last[1].start, server)


@pytest.mark.parametrize("harm", [lose, damage])
def test_a_lost_resident_factor_means_the_servers_copy(tiny, rounds, harm):
    def fault(attempt, partition, reply):
        if attempt == 1 and partition == 0:  # asked first: no other file is there yet
            (path,) = (state_folder({}) / "resident").iterdir()
            harm(path)
        return reply

    done = run(tiny(**open_run()), fault=fault)
    (_, first), (request, second), _ = rounds_of(done, rounds, 0)
    assert not same_bits(of_kind(first.result, "A"), of_kind(request.start, "A"))
    assert same_bits(second.start, request.start)
    (_, first), (request, second), _ = rounds_of(done, rounds, 1)  # the other one kept its own
    assert same_bits(of_kind(second.start, "A"), of_kind(first.result, "A"))


# --- random streams ---------------------------------------------------------------------------


def test_a_seeded_run_is_repeatable_to_the_bit(tiny, tmp_path, monkeypatch):
    seeded = {"privacy.noise": "seeded"}
    one, two = (run(fresh(tiny, tmp_path, monkeypatch, name, **seeded)) for name in ("a", "b"))
    assert same_bits(one.adapter, two.adapter)
    assert one.json("privacy.json")["private"] is False
    other = run(fresh(tiny, tmp_path, monkeypatch, "c", **seeded | {"seed": 1}))
    assert all(
        one.adapter[name].tobytes() != array.tobytes() for name, array in other.adapter.items()
    )


def test_secure_noise_never_repeats(tiny, tmp_path, monkeypatch):
    one, two = (run(fresh(tiny, tmp_path, monkeypatch, name)) for name in ("a", "b"))
    starts = [done.grid.trained(1)[0].start for done in (one, two)]
    assert same_bits(*starts)
    for name, array in one.adapter.items():
        assert array.tobytes() != two.adapter[name].tobytes()
    replies = [arrays(e.reply)[name] for e in one.grid.trained(1) for name in arrays(e.reply)]
    assert len({reply.tobytes() for reply in replies}) == len(replies)


# --- resume -----------------------------------------------------------------------------------


CRASHES = {
    "before a round": {"before": crash_before(3)},
    "in a round": {"fault": crash_after_training(3, clients=1)},
    "after a round": {"fault": crash_after_training(3, clients=2)},
}


@pytest.mark.parametrize(
    ("method", "moment"),
    [
        *(("la-lora", moment) for moment in CRASHES),
        ("fedex-lora", "in a round"),
        ("sd-lora", "before a round"),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    tiny, tmp_path, monkeypatch, method, moment
):
    changes = {
        "method": method,
        "privacy.noise": "seeded",
        "num-server-rounds": 4,
        "fraction-train": 0.5,  # of 4 clients: everyone takes part twice, with 3 steps
        "train.local-steps": 3,
        "train.batch-size": 6,
    }
    whole = run(fresh(tiny, tmp_path, monkeypatch, "whole", **changes), 4)
    config = fresh(tiny, tmp_path, monkeypatch, "halves", **changes)
    first, later = interrupted(config, 4, **CRASHES[moment])
    assert cohorts(first.grid).keys() >= {1, 2}
    assert (first.folder.latest().round, first.folder.latest().attempts) == (2, 2)
    second = run(later, 4)
    assert second.folder.path == first.folder.path
    assert cohorts(second.grid).keys() == {3, 4}
    assert {**cohorts(first.grid), **cohorts(second.grid)} == cohorts(whole.grid)
    for key in ("attempt", "round", "phase", "aggregated", "accuracy", "epsilon_max"):
        assert [row[key] for row in second.rows] == [row[key] for row in whole.rows], key
    assert same_bits(second.adapter, whole.adapter)
    assert second.json("summary.json")["rounds"] == 4
    entries = ledger_entries()
    assert {entry.run for entry in entries} == {first.folder.name}
    assert sorted(entry.round for entry in entries) == [1, 1, 2, 2, 3, 3, 4, 4]
    for book in by_dataset(entries).values():
        assert epsilon([entry.release for entry in book], DELTA) <= EPSILON


def test_a_round_that_was_answered_is_answered_again_and_costs_nothing(tiny, rounds):
    config = tiny(**sized())
    first, later = interrupted(config, 2, fault=crash_after_training(2, clients=2))
    second = run(later)
    for exchange in second.grid.trained(2):
        (before,) = [e for e in first.grid.trained(2) if e.partition == exchange.partition]
        assert same_bits(arrays(exchange.reply), arrays(before.reply))
    assert [r.t for r in rounds] == [1, 1, 2, 2, 3, 3]
    for book in by_dataset(ledger_entries()).values():
        assert [entry.round for entry in book] == [1, 2, 3]
        assert len({entry.release.noise_multiplier for entry in book}) == 1


def test_another_request_is_never_answered_with_an_old_reply(tiny, rounds):
    done = run(tiny(**sized() | {"num-server-rounds": 1}))
    exchange = done.grid.trained(1)[0]
    node = exchange.request.metadata.dst_node_id
    content = dict(exchange.request.content)
    config, order = messages.run_config_of(exchange.request.content), dict(content[messages.CONFIG])
    start = dict(content[messages.ARRAYS])
    head = next(name for name in start if ".lora_" not in name)
    moved = start | {head: Array(start[head].numpy() + np.float32(1e-7))}
    others = [
        {messages.CONFIG: ConfigRecord(order | {"run": "another"})},
        {messages.ARRAYS: ArrayRecord(moved)},
        {messages.RUN_CONFIG: messages.run_config(config | {"train.lr-b": 1e-4})},
    ]
    for change in others:
        before = len(rounds)
        message = Message(RecordDict(content | change), dst_node_id=node, message_type="train")
        reply = client_app.app(message, done.grid.contexts[node])
        told = reply.content["config"].get("refusal")  # a budget that is spent is an answer too
        assert (len(rounds), told) in ((before + 1, None), (before, "budget"))
    assert len(rounds) > 2


def test_a_repeated_round_costs_more_noise_and_not_more_epsilon(tiny, tmp_path, monkeypatch):
    config = fresh(tiny, tmp_path, monkeypatch, "run")
    first, later = interrupted(config, 2, fault=crash_after_training(2, clients=2))
    lose_replies()
    second = run(later)
    assert second.json("summary.json")["status"] == "completed"
    books = by_dataset(ledger_entries())
    assert len(books) == 2
    for book in books.values():
        assert [entry.round for entry in book] == [1, 2, 2, 3]
        assert {entry.run for entry in book} == {first.folder.name}
        noise = [entry.release.noise_multiplier for entry in book]
        assert noise[0] == noise[1] < noise[2] == noise[3]
        assert epsilon([entry.release for entry in book], DELTA) <= EPSILON
    assert second.rows[-1]["epsilon_max"] <= EPSILON


def test_a_repeated_round_starts_where_its_first_try_did(tiny, rounds):
    config = tiny(**open_run() | {"privacy.noise": "seeded"})
    _, later = interrupted(config, 2, fault=crash_after_training(2, clients=2))
    lose_replies()
    run(later)
    tries = [r for r in rounds if r.t == 2]
    first, again = tries[:2], tries[2:]
    assert len(first) == len(again) == 2
    for before, after in zip(first, again, strict=True):
        assert same_bits(before.start, after.start)


@pytest.mark.parametrize("budget", [EPSILON, INF])
def test_a_finished_run_may_be_resumed_and_stays_what_it_is(tiny, budget):
    config = tiny(**sized(**{"privacy.epsilon": budget}))
    done = run(config)
    before, summary = done.adapter, done.json("summary.json")
    spent = len(ledger_entries())
    again = parse(flatten(config) | {"resume-from": str(done.folder.path)})
    grid = FakeGrid(again, 2)
    server_app.run(grid, again)
    assert grid.trained() == []
    assert len(ledger_entries()) == spent
    assert same_bits(done.adapter, before)
    assert done.json("summary.json") | {"seconds": 0} == summary | {"seconds": 0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.rank", 3),
        ("seed", 7),
        ("method", "rolora"),
        ("privacy.epsilon", 2.0),
        ("privacy.noise", "seeded"),
        ("weighting", "public-size"),
        ("num-server-rounds", 9),
        ("train.lr-a", 1e-4),
    ],
)
def test_a_run_is_not_resumed_with_another_config(tiny, key, value):
    config = tiny(**open_run())
    folder = Path(config.output) / "old"
    folder.mkdir(parents=True)
    RunFolder(folder).write_config(config)
    changed = parse(flatten(config) | {"resume-from": str(folder), key: value})
    grid = FakeGrid(changed, 2)
    with pytest.raises(ConfigError) as caught:
        server_app.run(grid, changed)
    message = str(caught.value)
    assert message.startswith(f"{key}={value!r} must be {flatten(config)[key]!r}")
    assert "\n" not in message
    assert grid.trained() == []


def test_the_clock_of_a_resumed_run_goes_on_and_its_eta_is_of_the_session(tiny, caplog):
    config = tiny(**open_run(**{"num-server-rounds": 4}))
    first, later = interrupted(config, 2, before=crash_before(3))
    rows = first.rows
    first.folder.write_history([row | {"elapsed": 5000.0 * row["attempt"]} for row in rows])
    caplog.clear()
    with caplog.at_level("INFO", logger="flwr"):
        second = run(later)
    elapsed = [row["elapsed"] for row in second.rows]
    assert elapsed[:2] == [5000.0, 10_000.0]
    assert 10_000 < elapsed[2] < elapsed[3] < 10_300
    assert elapsed[3] - 1 < second.json("summary.json")["seconds"] < 10_300
    assert int(re.search(r"round 3/4 .* ETA (\d+):", caplog.text)[1]) < 3


def test_epsilon_max_survives_a_resume(tiny):
    config = tiny(**sized())
    first, later = interrupted(config, 2, before=crash_before(3))
    spent = first.rows[-1]["epsilon_max"]
    assert spent > 0
    second = run(later, 2, fault=lambda attempt, partition, reply: reply if not attempt else None)
    assert second.json("summary.json")["epsilon_max"] >= spent


def test_epsilon_max_covers_lost_replies(tiny):
    config = tiny(**sized())
    done = run(config, 2, fault=lambda attempt, partition, reply: reply if attempt < 3 else None)
    books = by_dataset(ledger_entries())
    spent = max(epsilon([entry.release for entry in book], DELTA) for book in books.values())
    assert done.json("privacy.json")["epsilon_max"] >= spent


# --- faults -----------------------------------------------------------------------------------


def test_a_failed_attempt_is_repeated_and_told(tiny):
    def fault(attempt, partition, reply):
        return None if attempt in (2, 4) and partition == 1 else reply

    done = run(tiny(**open_run() | {"num-server-rounds": 4}), 2, fault=fault)
    assert [row["round"] for row in done.rows] == [1, 2, 2, 3]
    assert [row["phase"] for row in done.rows] == ["B", "A", "A", "B"]
    assert [row["aggregated"] for row in done.rows] == [True, False, True, False]
    for failed in (1, 3):
        assert done.rows[failed]["dropped"] == ["1 did not answer in time"]
        assert done.rows[failed]["accuracy"] == done.rows[failed - 1]["accuracy"]
    before, after, last = (done.grid.trained(i)[0].start for i in (2, 3, 4))
    assert same_bits(before, after)
    assert same_bits(done.adapter, last)  # and not what the last client to train left in memory
    summary = done.json("summary.json")
    assert (summary["rounds"], summary["status"]) == (2, "completed, 2 rounds failed")


@pytest.mark.parametrize(
    ("every", "lost", "looks"),
    [(2, (), [0, 2, 4, 5]), (9, (), [0, 5]), (2, (2, 5), [0, 2, 4, 5]), (1, (2,), [0, 1, 3, 4, 5])],
    ids=["every second", "the last only", "and failed attempts", "a failed one is no new look"],
)
def test_the_test_split_is_looked_at_as_often_as_asked_and_at_the_end(
    tiny, monkeypatch, caplog, every, lost, looks
):
    seen, evaluate = [], backbone.Backbone.evaluate

    def counted(model, batches):
        seen.append(len(grid.trained()) // 2)  # attempts so far, of two clients
        return evaluate(model, batches)

    def fault(attempt, partition, reply):
        return None if attempt in lost and partition == 1 else reply

    monkeypatch.setattr(backbone.Backbone, "evaluate", counted)
    config = tiny(**open_run() | {"num-server-rounds": 5, "evaluate-every": every})
    grid = FakeGrid(config, 2, fault=fault)
    with caplog.at_level("INFO", "flwr"):
        server_app.run(grid, config)
    done = Run(config, grid, run_folder(config))
    # A failed attempt changes no adapter: nothing new to look at, if the one before was looked at.
    expected = [t for t in looks if t not in lost or (t - 1) not in looks]
    assert seen == expected
    told = [row["attempt"] for row in done.rows if "accuracy" in row]
    assert told == sorted({t for t in range(1, 6) if t % every == 0} | {5})
    assert done.json("summary.json")["accuracy"] == done.rows[-1]["accuracy"]
    assert caplog.text.count("not evaluated") == 5 - len(told)
    assert "<svg" in (done.folder.path / "report.html").read_text("utf-8")


def test_a_failed_attempt_costs_no_resident_factor(tiny, rounds):
    config = tiny(**open_run())
    run(config, 2, fault=lambda attempt, _, reply: None if attempt == 2 else reply)
    (first, _), (again, _) = rounds[0:2], rounds[4:6]
    assert (first.t, again.t) == (1, 2)
    assert same_bits(of_kind(again.start, "A"), of_kind(first.result, "A"))


def test_a_run_without_any_aggregate_fails_with_its_reasons(tiny):
    config = tiny(**open_run())
    grid = FakeGrid(config, 2, fault=lambda attempt, _, reply: None if attempt else reply)
    with pytest.raises(RuntimeError, match="no round was aggregated: 2 did not answer in time"):
        server_app.run(grid, config)
    summary = Run(config, grid, run_folder(config)).json("summary.json")
    assert set(summary) == {"method", "status"}
    assert summary["status"].startswith("failed")


def test_a_report_that_cannot_be_drawn_costs_no_result(tiny, monkeypatch, caplog):
    def broken(*args):
        raise ValueError("no font")

    monkeypatch.setattr("lalora_app.reports.page.write_report", broken)
    done = run(tiny(**open_run()))
    assert done.json("summary.json")["status"] == "completed"
    assert not (done.folder.path / "report.html").exists()
    assert "report.html cannot be drawn, all else is there: no font" in caplog.text


def test_two_runs_on_the_same_data_have_two_books(tiny):
    config = tiny(**sized())
    for _ in range(2):
        server_app.run(FakeGrid(config, 2), config)
    for book in by_dataset(ledger_entries()).values():
        runs = Counter(entry.run for entry in book)
        assert sorted(runs.values()) == [3, 3]


# --- nothing else leaves ----------------------------------------------------------------------


@pytest.mark.parametrize("public", [False, True])
def test_nothing_but_the_allowed_keys_leaves_a_client(tiny, public):
    nodes = [{}, {"max-epsilon": EPSILON / 10, "delta": DELTA}, {}]  # too small: refused
    config = tiny(**sized(3) | {"data.public-size": public})
    done = run(config, nodes)
    sizes = {"num-examples"} if public else set()
    seen = Counter()
    for exchange in done.grid.exchanges:
        assert not exchange.reply.has_error()
        got = contents(exchange.reply)
        if exchange.attempt == 0:
            assert got == {"config": {"client", "rank", "code"}}
        elif exchange.partition == 1:
            assert got == {"config": {"refusal"}}
        else:
            synced = METHODS["la-lora"].syncs(exchange.order["round"]) | {"head"}
            allowed = {n for n in exchange.start if kind(n) in synced}
            metrics = {"round", "epsilon"} | sizes
            assert got == {"arrays": allowed, "metrics": metrics, "config": {"code"}}
            if public:
                assert exchange.reply.content["metrics"]["num-examples"] == TRAIN_SIZE // 3
        seen[len(got)] += 1
    assert seen == {1: 3 + 3, 3: 6}


@pytest.mark.parametrize("public", [False, True])
def test_a_nodes_own_word_about_its_size_wins(tiny, public):
    config = tiny(**open_run(3) | {"data.public-size": public, "num-server-rounds": 1})
    done = run(config, [{"public-size": True}, {"public-size": False}, {}])
    assert sizes_told(done) == ({0, 2} if public else {0})


def test_a_size_is_public_by_a_boolean_only(tiny):
    config = tiny(**open_run(3) | {"num-server-rounds": 1})
    grid = FakeGrid(config, [{}, {"public-size": "false"}, {}])
    with pytest.raises(ConfigError, match="node config breaks a law"):
        server_app.run(grid, config)
    assert grid.trained() == []


SECRET = "SECRET-7f3a"
FAILURES = [
    RuntimeError(f"row 17: {SECRET}"),
    DataError("data.num-labels", f"=2: row 5 has label {SECRET}"),
    DataError(SECRET, "a key that nobody knows"),
    ConfigError(SECRET),
    tensors.WireError(SECRET),
    client_app.BudgetError(SECRET),
    KeyError(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_every_exception_becomes_a_fixed_refusal(error):
    def fail(message, context):
        raise error

    identify()
    request = Message(RecordDict(), dst_node_id=7, message_type="train")
    reply = client_app._answer(request, Context(1, 7, {}, RecordDict(), {}), fail)
    assert contents(reply) == {"config": {"refusal"}}
    assert reply.content["config"]["refusal"] in refusals.REFUSALS
    assert SECRET.encode() not in wire_bytes(reply)


@pytest.mark.parametrize("where", ["query", "before the ledger", "after the ledger"])
@pytest.mark.parametrize("error", FAILURES[:2], ids=lambda error: type(error).__name__)
def test_no_text_of_an_exception_leaves_a_client(tiny, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error

    module, name = {
        "query": (site, "partition"),
        "before the ledger": (resident_factors, "with_residents"),
        "after the ledger": (local_round, "run_round"),
    }[where]
    monkeypatch.setattr(module, name, fail)
    config = tiny(**open_run() | {"num-server-rounds": 1})
    grid = FakeGrid(config, 2)
    with pytest.raises((RuntimeError, ConfigError)) as caught:
        server_app.run(grid, config)
    assert SECRET not in str(caught.value)
    failed = [e.reply for e in grid.exchanges if e.attempt == (where != "query")]
    assert len(failed) == 2
    for reply in failed:
        assert contents(reply) == {"config": {"refusal"}}
    assert not any(SECRET.encode() in wire_bytes(reply) for reply in grid.replies())
    spent = {"after the ledger": 2}.get(where, 0)  # what is reserved counts, drawn or not
    assert len(ledger_entries()) == spent


# --- policies of the nodes --------------------------------------------------------------------


def test_a_node_with_a_smaller_budget_refuses_and_the_others_go_on(tiny):
    nodes = [{}, {"max-epsilon": EPSILON / 2, "delta": DELTA}, {}]
    done = run(tiny(**sized(3) | {"num-server-rounds": 1, "train.local-steps": 6}), nodes)
    for exchange in done.grid.trained():
        refused = exchange.reply.content["config"].get("refusal")
        assert refused == ("budget" if exchange.partition == 1 else None)
    assert all(row["aggregated"] and row["replies"] == 2 for row in done.rows)
    assert {tuple(row["dropped"]) for row in done.rows} == {
        (f"refused: {messages.REFUSALS['budget']}",)
    }
    books = by_dataset(ledger_entries())
    assert sorted(dataset.split()[-1] for dataset in books) == ["0/3", "2/3"]


def test_a_nodes_lifetime_budget_counts_over_runs(tiny):
    nodes = [{}, {"max-epsilon": 1.1 * EPSILON, "delta": DELTA}, {}]
    config = tiny(**sized(3) | {"num-server-rounds": 1, "train.local-steps": 6})
    first, second = FakeGrid(config, nodes), FakeGrid(config, nodes)
    for grid in (first, second):
        server_app.run(grid, config)
    answered = [
        [e for e in grid.trained() if e.partition == 1 and messages.ARRAYS in e.reply.content]
        for grid in (first, second)
    ]
    assert [len(exchanges) for exchanges in answered] == [1, 0]


def test_a_nodes_own_device_goes_before_the_runs(tiny, monkeypatch):
    built, honest = Counter(), backbone.build

    def spy(config):
        built[config.model.device] += 1
        return honest(config)

    monkeypatch.setattr(backbone, "build", spy)
    run(tiny(**open_run() | {"num-server-rounds": 1}), [{"device": "cpu"}, {}])
    assert built["cpu"] == 2  # to answer the query, and in the round


def test_a_node_with_a_budget_takes_no_noise_that_the_server_can_repeat(tiny):
    config = tiny(**sized(2) | {"privacy.noise": "seeded"})
    nodes = [{}, {"max-epsilon": 5.0, "delta": DELTA}]
    grid = FakeGrid(config, nodes)
    with pytest.raises(ConfigError, match="1 of 2 clients can take part"):
        server_app.run(grid, config)
    assert ledger_entries() == []
    # Nor when it is asked for in the message of a run that began otherwise.
    honest = tiny(**sized(2))
    grid = FakeGrid(honest, nodes)
    server_app.run(grid, honest)
    (exchange,) = [e for e in grid.trained(1) if e.partition == 1]
    before = len(ledger_entries())
    content = RecordDict(dict(exchange.request.content))
    content[messages.RUN_CONFIG] = messages.run_config(flatten(config))
    (node,) = [n for n, index in grid.partitions.items() if index == 1]
    forged = Message(content, dst_node_id=node, message_type="train")
    reply = client_app.app(forged, grid.contexts[node])
    assert reply.content["config"]["refusal"] == "policy"
    assert messages.ARRAYS not in reply.content
    assert len(ledger_entries()) == before


BAD_POLICIES = [
    {"max-epsilon": 5.0},  # without its delta
    {"max-epsilon": "1", "delta": DELTA},
    {"max-epsilon": 0.0, "delta": DELTA},
    {"max-epsilon": -1, "delta": DELTA},
    {"max-epsilon": float("nan"), "delta": DELTA},
    {"max-epsilon": 5.0, "delta": 1.5},
    {"max-epsilon": True, "delta": DELTA},
    {"device": "tpu"},
]


@pytest.mark.parametrize("policy", BAD_POLICIES)
def test_a_node_config_that_breaks_a_law_is_told_before_any_training(tiny, policy):
    config = tiny(**open_run() | {"num-server-rounds": 1})
    grid = FakeGrid(config, [policy, {}, {}])
    with pytest.raises(ConfigError, match="node config breaks a law"):
        server_app.run(grid, config)
    assert grid.trained() == []
    assert ledger_entries() == []


def test_real_clients_bring_their_own_files(tiny, tmp_path):
    nodes = []
    for index in range(2):
        path = tmp_path / f"own-{index}.jsonl"
        rows = [{"text": f"hello {index} {i}", "label": i % 2} for i in range(60 + 20 * index)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        home = {"state-path": str(tmp_path / f"state-{index}")}
        limit = {"max-epsilon": float("inf")}
        nodes.append({"data-path": str(path), "name": f"clinic {index}", **home, **limit})
    nodes[0]["dataset-id"] = "mail of 2026"
    done = run(tiny(**open_run()), nodes)
    names = {e.reply.content["config"]["client"] for e in done.grid.exchanges if not e.attempt}
    assert names == {"clinic 0", "clinic 1"}
    for index, dataset in enumerate(["mail of 2026", f"file {nodes[1]['data-path']}"]):
        entries = Ledger(tmp_path / f"state-{index}" / "ledger.sqlite").entries()
        assert {entry.dataset for entry in entries} == {dataset}
        assert {entry.release.sampling_rate for entry in entries} == {12 / (60 + 20 * index)}
    assert ledger_entries() == []


# --- participation ----------------------------------------------------------------------------


def test_participation_is_balanced_and_steps_left_count_down_to_the_last_round(tiny):
    config = tiny(**open_run(4) | {"fraction-train": 0.5, "num-server-rounds": 5})
    done = run(config, 4)
    steps: dict[int, list[int]] = {}
    for exchange in done.grid.trained():
        steps.setdefault(exchange.partition, []).append(exchange.order["steps-left"])
    counts = [len(left) for left in steps.values()]
    assert len(counts) == 4
    assert sum(counts) == 5 * 2
    assert max(counts) - min(counts) <= 1
    local = config.train.local_steps
    for left in steps.values():
        assert left == [local * n for n in range(len(left), 0, -1)]
    assert {len(asked) for asked in cohorts(done.grid).values()} == {2}


def test_an_error_of_ours_keeps_its_traceback_and_is_told_in_a_line(tiny, monkeypatch, caplog):
    def broken(*args):
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(server_app, "run", broken)
    context = Context(1, 1, {}, RecordDict(), flatten(tiny()))
    with caplog.at_level("ERROR", "flwr"), pytest.raises(ZeroDivisionError) as caught:
        server_app.main(FakeGrid({}, 1), context)
    assert caught.traceback[-1].name == "broken"
    assert caplog.messages == ["LaLoRA: ZeroDivisionError: division by zero"]


# --- bad input --------------------------------------------------------------------------------


@pytest.fixture
def refused(tiny):
    """Run a bad config as Flower does; return the one line, after checking that nothing began."""

    def start(changes, nodes=2):
        values = flatten(tiny(**open_run())) | changes
        grid = FakeGrid(values, nodes)
        identify()
        server = Context(1, 1, {}, RecordDict(), values)
        with pytest.raises(ConfigError) as caught:
            server_app.main(grid, server)
        assert grid.trained() == []
        assert ledger_entries() == []
        message = str(caught.value)
        assert "\n" not in message
        assert caught.value.__suppress_context__  # no traceback but Flower's own around the line
        return message

    return start


BAD = {
    "unknown key": ({"lora.rnk": 4}, ["lora.rnk=4", '"lora.rank"']),
    "mistyped": ({"lora.rank": "8"}, ["lora.rank='8'", "int"]),
    "a fraction for a count": ({"seed": 1.5}, ["seed=1.5", "int"]),
    "boolean for a number": ({"privacy.epsilon": True}, ["privacy.epsilon=True", "float"]),
    "zero epsilon": ({"privacy.epsilon": 0.0}, ["privacy.epsilon=0.0", "greater than 0"]),
    "negative epsilon": ({"privacy.epsilon": -3}, ["privacy.epsilon=-3.0", "greater than 0"]),
    "NaN epsilon": ({"privacy.epsilon": math.nan}, ["privacy.epsilon=nan", "greater than 0"]),
    "delta of 1": ({"privacy.delta": 1.0}, ["privacy.delta=1.0", "(0, 1)"]),
    "delta of one in n": ({"privacy.delta": 1 / 180}, ["privacy.delta", "1/n"]),
    "batch larger than data": ({"train.batch-size": 181}, ["train.batch-size", "at most"]),
    "rank above layer": ({"lora.rank": 17}, ["lora.rank=17", "at most 16"]),
    "unknown method": ({"method": "la-lara"}, ['method="la-lara"', '"la-lora"']),
    "missing model": ({"model.name": "/no/such/model"}, ['model.name="/no/such/model"']),
    "missing data": ({"data.name": "/no/such/data.csv"}, ['data.name="/no/such/data.csv"']),
    "no such column": ({"data.input-column": "body"}, ['data.input-column="body"', "text, label"]),
    "targets nowhere": ({"lora.targets": "nothing"}, ['lora.targets="nothing"', "query"]),
    "targets no Linear": ({"lora.targets": "LayerNorm"}, ['lora.targets="LayerNorm"', "Linear"]),
    "min-replies": ({"min-replies": 3}, ["min-replies=3", "at most the 2 clients"]),
    "min-replies of a fraction": (
        {"min-replies": 2, "fraction-train": 0.5},
        ["min-replies=2", "at most the 1 clients"],
    ),
    "too few nodes": (
        {"min-clients": 5, "node-timeout": 0.05},
        ["min-clients=5", "which is 2", "node-timeout=0.05"],
    ),
    "no folder to resume": ({"resume-from": "/no/such/run"}, ['resume-from="/no/such/run"']),
    "one step for two factors": (
        {"method": "la-lora-full", "train.local-steps": 1},
        ["train.local-steps=1", "la-lora-full"],
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_before_any_training(case, refused):
    changes, words = BAD[case]
    message = refused(changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "changes", [{"privacy.delta": 0.25}, {"train.batch-size": 181}], ids=lambda c: next(iter(c))
)
def test_a_refusal_names_the_value_too(changes, refused):
    ((key, value),) = changes.items()
    assert f"{key}={value}" in refused(changes)


def test_a_label_outside_the_head_is_one_line(refused, tmp_path):
    path = tmp_path / "three.jsonl"
    rows = [{"text": f"words {i}", "label": i % 3} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    message = refused({"data.name": str(path)})
    assert "data.num-labels=2" in message
    assert "label 2" in message


def test_an_empty_client_is_one_line(refused):
    changes = {"data.dirichlet-alpha": 1e-3, "train.batch-size": 1, "privacy.delta": 1e-5}
    assert refusals.REFUSALS["data"] in refused(changes, nodes=30)


def test_an_output_that_cannot_be_written_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    output = str(tmp_path / "file" / "out")
    message = refused({"output": output})
    assert f'output="{output}" must be writable' in message


def test_a_run_without_a_checkpoint_cannot_be_resumed(refused, tiny):
    config = tiny(**open_run())
    folder = Path(config.output) / "old"
    folder.mkdir(parents=True)
    RunFolder(folder).write_config(config)
    message = refused({"resume-from": str(folder)})
    assert f'resume-from="{folder}" must hold a checkpoint' in message


def test_unfit_nodes_are_told_before_any_training(refused):
    own = {"data-path": "/no/such/own.csv", "max-epsilon": INF}
    message = refused({}, nodes=[{}, own])
    assert "1 of 2 clients can take part" in message
    assert refusals.REFUSALS["data-path"] in message


def test_a_max_length_beyond_the_model_is_one_line(refused, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"text": f"{'hello ' * 40} {i}", "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    message = refused({"data.name": str(path), "model.max-length": 32})
    assert "model.max-length=32" in message


def test_two_clients_with_one_name_are_told(refused, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"text": f"hello {i}", "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    own = {"data-path": str(path), "max-epsilon": INF}
    twin = own | {"name": "clinic"}
    assert "same name" in refused({}, nodes=[twin, twin, own])


def test_a_node_with_data_of_its_own_and_no_limit_is_told(refused, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "hello", "label": 1}) + "\n", "utf-8")
    assert "node config breaks a law" in refused({}, nodes=[{}, {"data-path": str(path)}])


def test_a_refused_run_leaves_no_folder(refused, tmp_path):
    refused({"min-replies": 3})
    assert not list((tmp_path / "out").glob("*"))


def test_a_run_tells_how_many_test_texts_are_cut(tiny, caplog):
    config = tiny(**{"model.max-length": 5, "num-server-rounds": 1})
    with caplog.at_level("WARNING", "flwr"):
        server_app.run(FakeGrid(config, 2), config)
    found = re.search(r"(\d+) of (\d+) test texts fill model\.max-length=5 tokens", caplog.text)
    assert 0 < int(found[1]) <= int(found[2])
