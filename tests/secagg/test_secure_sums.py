"""Test that the sum of masked uploads is right, also when clients drop out.

The runs go through the real ServerApp, Strategy and ClientApps, over FakeGrid, with four clients:
three of them make a sum, so one may drop out at any stage.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from helpers.app_runs import (
    arrays,
    by_dataset,
    fresh,
    ledger_entries,
    open_run,
    run,
    same_bits,
    sized,
)
from helpers.secure_runs import (
    CLIENTS,
    ON,
    STAGES,
    changed,
    done_state,
    lose,
    stages_of,
    states,
    uploads,
)
from lalora_app.adapter.factors import B, active_names, select
from lalora_app.client import local_round
from lalora_app.methods.table import METHODS
from lalora_app.secagg import fixed_point, masks
from lalora_app.secagg.messages import MASKED
from lalora_app.wire.refusals import REFUSALS

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
SMALLEST = 2.0**-149  # of float32, subnormal


def assert_mean(found, summands, clients):
    bound = fixed_point.error_bound(clients)
    for name in summands[0]:
        wanted = np.mean([upload[name].astype(np.float64) for upload in summands], axis=0)
        rounding = np.abs(wanted) * 2.0**-24 + SMALLEST
        assert (np.abs(found[name] - wanted) <= bound + rounding).all(), name


def test_the_bound_on_a_float_is_one_that_another_mean_breaks():
    values = [{"x": np.float32([i, 2 * i])} for i in (1, 2, 4)]
    assert_mean({"x": np.float32([7 / 3, 14 / 3])}, values, 3)
    with pytest.raises(AssertionError):
        assert_mean({"x": np.float32([7 / 3, 14 / 3 + 1e-5])}, values, 3)


@pytest.mark.parametrize("method", ["la-lora", "dp-lora", "sd-lora", "fedrot-lora"])
def test_what_is_aggregated_is_the_mean(tiny, rounds, method):
    done = run(tiny(**open_run(CLIENTS) | ON | {"method": method}), CLIENTS)
    assert [row["replies"] for row in done.rows] == [CLIENTS] * 3
    assert [row["dropped"] for row in done.rows] == [[]] * 3
    for attempt, (before, after) in enumerate(pairwise(states(done)), 1):
        sent = list(uploads(done, rounds, attempt).values())
        if METHODS[method].aggregate is METHODS["la-lora"].aggregate or attempt == 1:
            assert_mean(after, sent, CLIENTS)
        still = set(before) - set(sent[0])
        assert all(np.array_equal(before[name], after[name]) for name in still) or attempt > 1
        assert any(not np.array_equal(before[name], after[name]) for name in sent[0])


@pytest.mark.parametrize("stage", STAGES)
def test_one_client_may_drop_out_at_any_stage(tiny, rounds, stage):
    config = tiny(**open_run(CLIENTS) | ON)
    done = run(config, CLIENTS, fault=lose(stage, 2, 1))
    assert [row["aggregated"] for row in done.rows] == [True] * 3
    told = {"train": "1 did not answer in time"}
    told = told.get(stage, f"{stage}: the reply lacks this stage")
    assert done.rows[1]["dropped"] == [told]
    sent = uploads(done, rounds, 2)
    trains = stage in ("train", "unmask")
    assert set(sent) == {0, 1, 2, 3} if trains else {0, 2, 3}
    counted = {0, 1, 2, 3} if stage == "unmask" else {0, 2, 3}
    assert done.rows[1]["replies"] == len(counted)
    directory = 3 if stage == "advertise" else 4
    summands = [upload for partition, upload in sent.items() if partition in counted]
    assert_mean(done_state(done, 2), summands, directory)
    # The round before is whole, and that after unless its shares were lost too.
    assert_mean(done_state(done, 1), list(uploads(done, rounds, 1).values()), CLIENTS)
    assert_mean(done_state(done, 3), list(uploads(done, rounds, 3).values()), CLIENTS)
    assert done.rows[2]["replies"] == CLIENTS - (stage == "train")
    # Nobody has spent twice.
    books = by_dataset(ledger_entries())
    spent = 3 - (stage != "unmask")
    assert sorted(len(book) for book in books.values()) == [spent, 3, 3, 3]


@pytest.mark.parametrize("server", [{}, {"server.optimizer": "momentum", "server.lr": 0.5}])
def test_a_sum_is_as_good_as_the_uploads(tiny, tmp_path, monkeypatch, server):
    """One round with seeded noise, with and without: the same adapter to the bound."""
    changes = open_run(CLIENTS) | {"privacy.noise": "seeded", "num-server-rounds": 1} | server
    config = fresh(tiny, tmp_path, monkeypatch, "plain", **changes)
    plain = run(config, CLIENTS).folder.latest()
    masked = run(fresh(tiny, tmp_path, monkeypatch, "masked", **changes | ON), CLIENTS)
    found = masked.folder.latest().adapter
    bound = fixed_point.error_bound(CLIENTS)
    for name, array in plain.adapter.items():
        assert np.abs(found[name] - array).max() <= bound + 2.0**-23 * np.abs(array).max(), name
    moments = masked.folder.latest().first_moment
    assert set(moments) == set(plain.first_moment) == (select(found, B) if server else {}).keys()
    for name, array in plain.first_moment.items():
        rounding = 2.0**-23 * np.abs(plain.adapter[name]).max()  # of the mean that was subtracted
        assert np.abs(moments[name] - array).max() <= bound + rounding, name
    # What only single uploads tell is not told.
    (row,) = masked.rows
    for key in ("aggregation_error", "remaining_error", "update_cosine"):
        assert row[key] is None
    (exchange, *_) = masked.grid.trained()
    assert row["upload_bytes"] == arrays(exchange.reply)[MASKED].nbytes


@pytest.mark.parametrize("stage", STAGES)
def test_with_too_few_clients_left_nothing_moves_and_the_run_goes_on(tiny, stage):
    config = tiny(**open_run(CLIENTS) | ON | {"min-replies": 3})
    done = run(config, CLIENTS, fault=lose(stage, 2, 0, 3))
    assert [row["aggregated"] for row in done.rows] == [True, False, True]
    assert [row["round"] for row in done.rows] == [1, 2, 2]
    assert [row["phase"] for row in done.rows] == ["B", "A", "A"]
    told = "did not answer in time" if stage == "train" else "lacks this stage"
    assert any(told in reason for reason in done.rows[1]["dropped"])
    if done.grid.trained(2):
        before, after = (done.grid.trained(i)[0].start for i in (2, 3))
        assert same_bits(before, after)
    asked = Counter(
        kind
        for exchange in done.grid.exchanges
        if exchange.attempt
        for kind, attempt in stages_of(exchange.request).items()
        if attempt == 2
    )
    # The pipeline has asked once, and the set-up once more.
    wanted = {
        "advertise": {"advertise": 8},
        "share": {"advertise": 8, "share": 8},
        "train": {"advertise": 4, "share": 4, "train": 4},
        "unmask": {"advertise": 4, "share": 4, "train": 4, "unmask": 4},
    }
    assert asked == wanted[stage]
    books = by_dataset(ledger_entries())
    trained = 3 if stage in ("train", "unmask") else 2
    assert [len(book) for book in books.values()] == [trained] * CLIENTS


def test_an_attempt_that_never_trained_costs_no_epsilon(tiny):
    """Keys were lost, and nobody was asked to train: the largest epsilon is still the first's."""
    config = tiny(**sized(CLIENTS) | ON)
    done = run(config, CLIENTS, fault=lose("share", 2, 0, 1, 2))
    spent = [row["epsilon_max"] for row in done.rows]
    assert spent[0] == spent[1] < spent[2] <= config.privacy.epsilon


@pytest.mark.parametrize("harm", [np.nan, np.inf, 100.0])
def test_an_update_that_the_sum_cannot_hold_is_refused_by_its_client(tiny, monkeypatch, harm):
    honest, calls = local_round.run_round, []

    def harmed(model, data, start, drift, **options):
        result = honest(model, data, start, drift, **options)
        calls.append(options["local"].t)
        if len(calls) == 6:  # the second client of the second attempt
            name = min(active_names(result, METHODS["la-lora"].sent(2, last=False)))
            result[name] = result[name].copy()
            result[name].flat[0] = harm
        return result

    monkeypatch.setattr(local_round, "run_round", harmed)
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS)
    assert [row["replies"] for row in done.rows] == [4, 3, 4]
    assert done.rows[1]["dropped"] == [f"refused: {REFUSALS['update']}"]
    assert all(np.isfinite(array).all() for array in done.adapter.values())
    # What it drew has been counted all the same.
    assert [len(book) for book in by_dataset(ledger_entries()).values()] == [3] * CLIENTS


def forged(record):
    return record | {"shares": [share[:4] + share[:3:-1] for share in record["shares"]]}


def foreign_key(record):
    return record | {"mask-key": masks.public_key_of(masks.new_private_key())}


def no_key(record):
    return record | {"mask-key": bytes(32)}  # of low order


def without_shares(record):
    return {name: value for name, value in record.items() if name != "shares"}


@pytest.mark.parametrize(
    ("stage", "change", "works"),
    [
        ("unmask", forged, False),  # no wrong sum: the client committed to its seed
        ("unmask", without_shares, True),  # three others have helped
        ("share", without_shares, True),
        ("advertise", foreign_key, True),  # it refuses the directory, and is left behind
        ("advertise", lambda record: {}, True),
    ],
)
def test_a_bad_reply_at_a_stage_is_dropped_or_fails_the_attempt(tiny, stage, change, works):
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS, fault=changed(stage, 2, change, 1))
    assert [row["aggregated"] for row in done.rows] == [True, works, True]
    assert done.rows[1]["dropped"]


def test_a_key_that_is_none_costs_its_client_the_attempt_and_no_other(tiny):
    """The others, which would all refuse the directory, do not get it, and nothing is repeated."""
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS, fault=changed("advertise", 2, no_key, 1))
    assert [row["replies"] for row in done.rows] == [4, 3, 4]
    assert any("of low order" in reason for reason in done.rows[1]["dropped"])
