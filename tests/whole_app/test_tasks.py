"""Runs with tasks over time: each block of rounds has examples, releases and noise of its own."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from conftest import written
from helpers.app_runs import (
    DELTA,
    EPSILON,
    INF,
    arrays,
    by_dataset,
    crash_before,
    fresh,
    interrupted,
    ledger_entries,
    local_steps,
    run,
    same_bits,
    sized,
)
from helpers.fake_grid import FakeGrid
from lalora_app import client_app, server_app
from lalora_app.adapter.closed_rows import with_closed_rows
from lalora_app.adapter.factors import kind
from lalora_app.audit.one_audit import FAST, REAL, AuditRequest
from lalora_app.client import local_round
from lalora_app.data.examples import split
from lalora_app.data.task_division import division_of, of_task
from lalora_app.models.backbone import build
from lalora_app.models.scores import CLASSIFICATION, within_tasks
from lalora_app.privacy.accounting import Release, calibrate, epsilon, second_epsilon
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.ledger_entries import compositions, worst_releases
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.step import RandomStreams
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten, parse
from lalora_app.wire import messages
from lalora_app.wire.refusals import REFUSALS

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
TASKS = {"data.tasks": 2, "data.labels": "0,1", "num-server-rounds": 4}
ONE_CLASS_EACH = {"data.partitioner": "pathological", "data.classes-per-client": 1}


def tasks(**changes):
    return sized(**TASKS | {"method": "dp-lora"} | changes)


@pytest.fixture
def trained_on(monkeypatch):
    """(round, labels of the examples) of every client's round, in order."""
    seen = []
    honest = local_round.run_round

    def spy(model, data, start, drift, **options):
        seen.append((options["local"].t, data.labels))
        return honest(model, data, start, drift, **options)

    monkeypatch.setattr(local_round, "run_round", spy)
    return seen


def test_a_round_trains_on_the_examples_of_its_own_task_only(tiny, trained_on):
    config = tiny(**tasks(**{"data.task-order": "seeded", "seed": 1}))
    run(config)
    classes = [set(division_of(config).values_of(task)) for task in range(2)]
    assert classes[0] | classes[1] == {"0", "1"}
    assert [t for t, _ in trained_on] == [1, 1, 2, 2, 3, 3, 4, 4]
    for t, labels in trained_on:
        assert {str(label) for label in labels} == classes[(t - 1) // 2]
    whole = split(config.data)[0]
    first = [labels for t, labels in trained_on if t == 1]
    second = [labels for t, labels in trained_on if t == 3]
    assert sum(map(len, first)) + sum(map(len, second)) == len(whole)


def test_each_block_has_its_own_noise_and_epsilon_is_that_of_the_worst_part(tiny):
    config = tiny(**tasks())
    done = run(config)
    for lines in by_dataset(ledger_entries()).values():
        parts = [entry.part for entry in lines]
        assert parts == [division_of(config).part(task) for task in (0, 0, 1, 1)]
        for block in (lines[:2], lines[2:]):
            rate = block[0].release.sampling_rate
            noise = calibrate(EPSILON, DELTA, sampling_rate=rate, steps=4)
            assert [entry.release for entry in block] == [Release(rate, noise, 2)] * 2
            spent = [entry.release for entry in block]
            assert 0.98 * EPSILON < epsilon(spent, DELTA) <= EPSILON
            assert second_epsilon(spent, DELTA) <= 1.01 * EPSILON + 0.004
        assert len(compositions(lines)) == 2
        worst = epsilon(worst_releases(lines, DELTA), DELTA)
        assert worst <= EPSILON < epsilon([entry.release for entry in lines], DELTA)
    assert EPSILON - 0.01 < done.json("summary.json")["epsilon_max"] <= EPSILON + 0.01
    assert "of each task by itself" in done.json("privacy.json")["composition"]


def test_a_repeated_round_does_not_exceed_the_budget_of_its_task(tiny):
    def lose_round_3(attempt, partition, reply):
        return None if attempt == 3 and partition == 0 else reply

    config = tiny(**tasks(**{"num-server-rounds": 5}))
    done = run(config, fault=lose_round_3)
    assert [row["round"] for row in done.rows] == [1, 2, 3, 3, 4]
    for lines in by_dataset(ledger_entries()).values():
        assert epsilon(worst_releases(lines, DELTA), DELTA) <= EPSILON


def test_history_and_summary_hold_the_accuracy_of_every_task_so_far(tiny):
    config = tiny(**tasks())
    done = run(config)
    found = [row.get("task_accuracy") for row in done.rows]
    assert found[0] is found[2] is None
    assert [len(found[1]), len(found[3])] == [1, 2]
    test = split(config.data)[1]
    sizes = [len(of_task(test, config, task)) for task in range(2)]
    mean = np.average(found[3], weights=sizes)
    assert mean == pytest.approx(done.rows[3]["accuracy"])
    summary = done.json("summary.json")
    assert summary["task_accuracy"] == [found[1], found[3]]
    assert summary["average_accuracy"] == pytest.approx(sum(found[3]) / 2)
    assert summary["forgetting"] == pytest.approx(found[1][0] - found[3][0])
    assert summary["backward_transfer"] == -summary["forgetting"]


@pytest.mark.parametrize("attempt", [2, 3, 4])
def test_a_resumed_run_goes_on_with_the_task_that_was_open(tiny, tmp_path, monkeypatch, attempt):
    keys = tasks(**{"privacy.noise": "seeded", "method": "la-lora"})
    whole = run(fresh(tiny, tmp_path, monkeypatch, "whole", **keys))
    begun = fresh(tiny, tmp_path, monkeypatch, "begun", **keys)
    _, later = interrupted(begun, 2, before=crash_before(attempt))
    done = run(later)
    assert same_bits(done.adapter, whole.adapter)
    assert done.json("summary.json")["task_accuracy"] == whole.json("summary.json")["task_accuracy"]


def test_a_client_without_examples_of_a_task_sends_noise_alone(tiny):
    sgd = {f"train.lr-{part}": 1.0 for part in ("a", "b", "head", "decay")}
    sgd |= {"train.optimizer": "sgd"}
    config = tiny(**tasks(**ONE_CLASS_EACH, **sgd, **{"num-server-rounds": 2}))
    done = run(config)
    empty = [e.partition for e in done.grid.trained(2)]
    parts = {name: lines for name, lines in by_dataset(ledger_entries()).items()}
    assert len(parts) == 2
    rates = sorted(tuple(e.release.sampling_rate for e in lines) for lines in parts.values())
    assert [1.0 in rate for rate in rates] == [True, True]  # each has no example of one task
    assert len(empty) == 2
    for exchange in done.grid.trained():
        lines = parts[next(n for n in parts if n.endswith(f"{exchange.partition}/2"))]
        release = lines[exchange.attempt - 1].release
        if release.sampling_rate < 1:
            continue
        sent = arrays(exchange.reply)
        moved = np.concatenate([(sent[n] - exchange.start[n]).ravel() for n in sent])
        # two steps at rate 1, each with noise of z·C over the batch size
        std = math.sqrt(2) * release.noise_multiplier / config.train.batch_size
        assert moved.std() == pytest.approx(std, rel=0.1)
        assert abs(moved.mean()) < 4 * std / math.sqrt(moved.size)


@pytest.mark.parametrize("public", [False, True])
def test_without_noise_a_client_without_examples_sends_what_it_received(tiny, public):
    """Its size of 0 is no reason to drop its reply."""
    keys = {"privacy.epsilon": INF, "train.optimizer": "sgd", "data.public-size": public}
    done = run(tiny(**tasks(**ONE_CLASS_EACH, **keys)))
    assert [row["replies"] for row in done.rows] == [2] * 4
    still = [
        same_bits(arrays(e.reply), {n: e.start[n] for n in arrays(e.reply)})
        for e in done.grid.trained()
    ]
    assert sum(still) == 4  # one of two clients in each of four rounds


def test_few_examples_count_as_much_as_those_of_a_full_batch(tiny):
    """With 3 examples a batch of 12 divides their sum by 12, and not by 3."""
    config = tiny(**tasks(**{"privacy.epsilon": INF, "train.optimizer": "sgd"}))
    model, start = build(config)
    whole = split(config.data)[0]
    data = model.encode(whole.take([0, 1, 2]))
    results = []
    for batch, rates in ((12, 1.0), (3, 0.25)):
        changed = tiny(
            **tasks(
                **{
                    "privacy.epsilon": INF,
                    "train.optimizer": "sgd",
                    "train.batch-size": batch,
                    "train.lr-a": rates,
                    "train.lr-b": rates,
                    "train.lr-head": rates,
                }
            )
        )
        assert changed.train.rate(3) == 1.0
        reservation = Reservation(Release(1.0, 0.0, 2))
        streams = RandomStreams(seeded(0, "sampling"), seeded(0, "noise"))
        local = replace(local_steps(changed), least_divisor=batch)
        results.append(
            local_round.run_round(
                model, data, start, {}, local=local, reservation=reservation, streams=streams
            )
        )
    for name in results[0]:
        assert np.allclose(results[0][name], results[1][name], atol=1e-6)
    assert any(not np.array_equal(results[0][n], start[n]) for n in start if kind(n) == "head")


@pytest.fixture
def two_heads(tiny, tmp_path):
    """Config factory with four classes of the tiny texts, in two tasks with a head each."""
    rows = [
        {"text": text, "label": 2 * label + i % 2}
        for side in split(tiny(**tasks()).data)
        for i, (text, label) in enumerate(zip(side.contents, side.labels, strict=True))
    ]
    keys = {
        "data.name": str(written(tmp_path / "four.jsonl", rows)),
        "data.labels": "0,1,2,3",
        "data.num-labels": 4,
    }
    return lambda **changes: tiny(**tasks(**keys | {"model.task-heads": True} | changes))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"train.weight-decay": 0.1},
        {"server.optimizer": "momentum", "server.momentum": 0.9},
        {"server.optimizer": "adam", "server.lr": 0.1},
        {"method": "dp-fedadamw-full", "train.lr-head": 0.01},
        {"secure-aggregation": "secagg+"},
    ],
    ids=lambda keys: next(iter(keys.values()), "plain"),
)
def test_the_head_of_a_closed_task_rests(two_heads, keys):
    done = run(two_heads(**{"train.optimizer": "sgd"} | keys))
    trained = done.grid.trained()
    last = max(exchange.order["round"] for exchange in trained)
    final = next(e.start for e in trained if e.order["round"] == last)
    opened = next(e.start for e in trained if e.order["round"] == 3)  # the second task's start
    heads = [name for name in final if kind(name) == "head"]
    assert heads
    assert last > 3
    for name in heads:
        np.testing.assert_array_equal(final[name][:2], opened[name][:2])
        assert (final[name][2:] != opened[name][2:]).all()
    if "secure-aggregation" in keys:  # uploads are masked
        return
    for exchange in trained:
        sent, rows = arrays(exchange.reply), [slice(0, 2), slice(2, 4)]
        first = exchange.order["round"] <= 2
        opened, closed = rows if first else rows[::-1]
        for name in heads:
            before, after = exchange.start[name], sent[name]
            np.testing.assert_array_equal(after[closed], before[closed])
            assert (after[opened] != before[opened]).all()
    assert len(done.json("summary.json")["task_accuracy"]) == 2


def test_the_card_tells_what_holds_with_tasks_only(two_heads):
    done = run(two_heads())
    card = (done.folder.adapter / "README.md").read_text("utf-8")
    report = done.json("privacy.json")
    assert "among the classes of the example's own task only; this model chooses among all" in card
    for text in (report["unit"], report["accountant"], report["not_covered"]):
        assert text in card
    assert "of the same task" in report["unit"]
    assert report["accountant"].endswith("composed over all rounds of a task")
    assert report["not_covered"].endswith("which task an example is in")
    assert "`lalora audit` takes no run with tasks" in card
    assert [row["task"] for row in done.rows] == [1, 1, 2, 2]


def test_an_example_chooses_among_the_classes_of_its_own_task():
    rng, tasks_of_class = np.random.default_rng(0), (0, 1, 0, 1, 1)
    logits, labels = torch.from_numpy(rng.standard_normal((30, 5))), torch.arange(30) % 5
    task = within_tasks(CLASSIFICATION, tasks_of_class)
    losses, counts = task.losses(logits, labels).tolist(), np.zeros((5, 5))
    for row, label, loss in zip(logits.tolist(), labels.tolist(), losses, strict=True):
        own = [c for c in range(5) if tasks_of_class[c] == tasks_of_class[label]]
        total = sum(math.exp(row[c]) for c in own)
        assert loss == pytest.approx(-math.log(math.exp(row[label]) / total))
        counts[label, max(own, key=lambda c: row[c])] += 1
    np.testing.assert_array_equal(task.count(logits, labels), counts)
    whole = within_tasks(CLASSIFICATION, (0,) * 5)
    assert torch.equal(whole.losses(logits, labels), CLASSIFICATION.losses(logits, labels))


def test_only_the_rows_of_closed_classes_rest():
    head, bias = "model.classifier.weight", "model.classifier.bias"
    shapes = {head: (3, 4), bias: (3,), "x.lora_A.weight": (3, 4), "x.lora_B.weight": (4, 3)}
    before = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    after = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    found = with_closed_rows(before, after, (False, True, True))
    assert found[head].sum(1).tolist() == [4, 0, 0]
    assert found[bias].tolist() == [1, 0, 0]
    assert all(found[name] is after[name] for name in after if kind(name) != "head")
    for none in ((), (False,) * 3):
        assert all(array is after[n] for n, array in with_closed_rows(before, after, none).items())


@pytest.mark.parametrize("method", ["sd-lora", "duallora"])
def test_methods_with_tasks_have_those_of_the_data(tiny, method):
    with pytest.raises(ConfigError, match=r"^rule\.tasks=3 must be data\.tasks=2 for method"):
        run(tiny(**tasks(method=method, **{"rule.tasks": 3})))
    done = run(tiny(**tasks(method=method, **{"rule.tasks": 2})))
    assert len(done.json("summary.json")["task_accuracy"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.head": "class-means"}, r'^model\.head="class-means" must be another start for'),
        ({"train.head-rounds": 1}, r"^train\.head-rounds=1 must be 0 for data\.tasks=2"),
        ({"train.sampling-rate": 0.1}, r"^train\.sampling-rate=0\.1 must be 0\.0 for data\.tasks"),
        (
            {"weighting": "public-size"},
            r'^weighting="public-size" must be "uniform" for',
        ),
        ({"data.task-column": "label"}, r'^data\.task-column="label" must be "none" to divide'),
        ({"num-server-rounds": 1}, r"^num-server-rounds=1 must be at least data\.tasks=2"),
        ({"data.tasks": 1, "data.task-column": "x"}, r'^data\.task-column="x" must be "none" for'),
        ({"data.tasks": 1, "data.task-values": "a,b"}, r'^data\.task-values="a,b" must be "auto"'),
        ({"data.tasks": 1, "model.task-heads": True}, r"^model\.task-heads=true must be false for"),
        ({"data.tasks": 1, "data.task-order": "seeded"}, r'^data\.task-order="seeded" must be "l'),
        ({"data.tasks": 3}, r"^data\.tasks=3 must be at most 2, the number of classes"),
        (
            {"model.task-heads": True},
            r"^data\.tasks=2 must be at most 1 for model\.task-heads=true",
        ),
        ({"data.task-values": "a,b"}, r'^data\.task-values="a,b" must be "auto" for data\.task-c'),
        ({"data.task-column": "text"}, r'^data\.task-column="text" must be another column than'),
        (
            {"model.task-heads": True, "model.task": "causal-lm", "model.pooling": "model"},
            r"^model\.task-heads=true must be false for model\.task=\"causal-lm\"",
        ),
        (
            {"method": "sd-lora", "data.tasks": 1, "rule.tasks": 5},
            r"^rule\.tasks=5 must be at most 4 for method sd-lora",
        ),
        (
            {"method": "duallora", "rule.tasks": 2, "lora.rank": 1},
            r"^lora\.rank=1 must be at least 2 for method duallora with rule\.tasks=2",
        ),
        (
            {"method": "losa", "rule.sparsity": 0.9, "rule.sparsity-spread": 0.2},
            r"^rule\.sparsity-spread=0\.2 must be at most 0\.1 for rule\.sparsity=0\.9",
        ),
    ],
)
def test_what_makes_no_sense_with_tasks_is_refused(tiny, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(tiny(**tasks(**changes)))
    assert ledger_entries() == []


def test_a_task_without_a_public_test_example_is_refused(tiny):
    config = tiny(**tasks(**{"data.labels": "0,1,2", "data.tasks": 3, "data.num-labels": 3}))
    with pytest.raises(ConfigError, match=r"^data\.tasks=3 must leave .* task 3 has none: '2'$"):
        run(config)


def test_an_audit_of_tasks_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"^data\.tasks=2 must be 1 for an audit"):
        AuditRequest(tiny(**tasks()), REAL, 2, 0.95, FAST)


@pytest.fixture
def by_domain(tiny, tmp_path):
    """The run's public data, and the files of two sites, with a column of domains."""
    rows = [
        {"text": text, "label": label, "domain": ("books", "films")[i % 2]}
        for side in split(tiny(**tasks()).data)
        for i, (text, label) in enumerate(zip(side.contents, side.labels, strict=True))
    ]
    files = [written(tmp_path / f"{name}.jsonl", rows[k:200:2]) for k, name in enumerate("ab")]
    public = written(tmp_path / "public.jsonl", rows)
    keys = {
        "data.name": str(public),
        "data.task-column": "domain",
        "data.partitioner": "iid",
        "data.labels": "0,1",
    }
    nodes = [
        {"data-path": str(file), "name": file.stem, "max-epsilon": 10.0, "delta": DELTA}
        for file in files
    ]
    return tiny(**tasks(**keys)), nodes


def test_a_column_divides_the_data_of_real_sites(by_domain, trained_on):
    config, nodes = by_domain
    nodes = [node | {"task-column": "domain", "task-values": "films,books"} for node in nodes]
    done = run(config, nodes)
    assert len(done.json("summary.json")["task_accuracy"]) == 2
    # each site has rows of one domain only: every second row of all
    sizes = [len(labels) for _, labels in trained_on]
    assert sorted(size == 0 for size in sizes) == [False] * 4 + [True] * 4


def test_tasks_of_a_column_share_one_head(by_domain):
    config, _ = by_domain
    keys = flatten(config) | {"model.task-heads": True}
    with pytest.raises(
        ConfigError, match=r"^model\.task-heads=true must be false for data\.task-c"
    ):
        parse(keys)


def refused(config, nodes) -> str:
    """The reason why no site takes part; nothing is spent."""
    grid = FakeGrid(config, nodes)
    with pytest.raises(ConfigError) as caught:
        server_app.run(grid, config)
    assert ledger_entries() == []
    return str(caught.value)


@pytest.mark.parametrize(
    "own",
    [
        {"task-column": "label", "task-values": "books,films"},
        {"task-values": "books,films"},
        {"task-column": "domain", "task-values": "books,cars"},
        {"task-column": "domain", "task-values": "books,films,cars"},
    ],
)
def test_a_site_decides_which_column_and_values_divide_its_data(by_domain, own):
    config, nodes = by_domain
    assert REFUSALS["policy"] in refused(config, [node | own for node in nodes])


def test_a_site_must_name_the_values_of_its_column(by_domain):
    config, nodes = by_domain
    own = {"task-column": "domain"}
    assert REFUSALS["config"] in refused(config, [node | own for node in nodes])


def test_a_sites_unknown_value_is_told_in_a_fixed_sentence(by_domain, tmp_path):
    config, nodes = by_domain
    row = {"text": "secret", "label": 0, "domain": "cars"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    own = {"task-column": "domain", "task-values": "books,films"}
    said = refused(config, [node | own for node in nodes])
    assert REFUSALS["rows"] in said
    assert "cars" not in said


def test_tasks_of_classes_need_a_sites_consent(by_domain):
    config, nodes = by_domain
    data = replace(config.data, task_column="none", task_values="auto")
    config = replace(config, data=data)
    assert REFUSALS["policy"] in refused(config, nodes)
    done = run(config, [node | {"class-tasks": True} for node in nodes])
    assert len(done.json("summary.json")["task_accuracy"]) == 2


def test_all_examples_of_a_site_decide_on_its_part_also_with_a_cache(by_domain, tmp_path):
    """A site with a warm cache checks batch size and δ against all of its examples."""
    config, nodes = by_domain
    own = {"task-column": "domain", "task-values": "books,films", "max-epsilon": INF}
    nodes = [node | own | {"data-cache": str(tmp_path / "cache")} for node in nodes]
    done = run(config, nodes)
    asked = done.grid.trained()[-1]
    for changes in ({"privacy.delta": 0.9}, {"train.batch-size": 150}):
        flat = dict(messages.run_config_of(asked.request.content)) | changes
        content = RecordDict(dict(asked.request.content))
        content[messages.RUN_CONFIG] = messages.run_config(flat)
        order = dict(content[messages.CONFIG]) | {"run": "another"}
        content[messages.CONFIG] = ConfigRecord(order)
        context = done.grid.contexts[asked.request.metadata.dst_node_id]
        message = Message(content, dst_node_id=context.node_id, message_type="train")
        before = ledger_entries()
        reply = client_app.app(message, context)
        assert reply.content[messages.CONFIG]["refusal"] in ("privacy.delta", "train.batch-size")
        assert ledger_entries() == before


def test_a_run_whose_last_round_fails_has_no_summary_of_all_tasks(tiny):
    def lost(attempt, partition, reply):
        return None if attempt == 4 and partition == 0 else reply  # task 2 has trained in round 3

    done = run(tiny(**tasks()), fault=lost)
    assert [len(row) for row in done.json("summary.json")["task_accuracy"]] == [1, 2]
    assert done.json("summary.json")["average_accuracy"] < 1


def test_a_run_that_never_reached_its_last_task_has_the_matrix_only(tiny):
    def lost(attempt, partition, reply):
        return None if attempt >= 3 and partition == 0 else reply

    done = run(tiny(**tasks()), fault=lost)
    summary = done.json("summary.json")
    assert [len(row) for row in summary["task_accuracy"]] == [1]
    assert not {"average_accuracy", "forgetting", "backward_transfer"} & summary.keys()
