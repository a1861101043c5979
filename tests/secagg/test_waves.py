"""Test that a round takes two waves of messages, and who comes back after a lost message."""

from collections import Counter

import pytest

from helpers.app_runs import by_dataset, cohorts, ledger_entries, open_run, run
from helpers.secure_runs import CLIENTS, ON, lose, lose_wave, stages_of

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
FIVE = open_run(CLIENTS) | ON | {"num-server-rounds": 5}
SET_UP = 2


def waves(done):
    """The number of waves of each attempt."""
    return [done.grid.waves.count(attempt) for attempt in range(1, len(done.rows) + 1)]


def stages(done):
    """How many clients were asked for each stage of each attempt."""
    requests = [e.request for e in done.grid.exchanges if e.attempt]
    return Counter(pair for request in requests for pair in stages_of(request).items())


def test_a_round_takes_two_waves_after_the_set_up(tiny):
    done = run(tiny(**FIVE), CLIENTS)
    assert [row["replies"] for row in done.rows] == [CLIENTS] * 5
    assert waves(done) == [SET_UP + 2, 2, 2, 2, 2]
    kinds = ("advertise", "share", "train", "unmask")
    # Each stage once per attempt, and none of an attempt beyond the last.
    assert stages(done) == {(kind, t): CLIENTS for kind in kinds for t in range(1, 6)}


def test_a_run_of_one_round_takes_four_waves(tiny):
    done = run(tiny(**FIVE | {"num-server-rounds": 1}), CLIENTS)
    assert (waves(done), done.rows[0]["replies"]) == ([SET_UP + 2], CLIENTS)


@pytest.mark.parametrize(
    ("kind", "replies"),
    [
        ("train", [4, 3, 3, 4, 4]),  # the upload of 2 and the shares of 3
        ("train.secagg", [4, 4, 4, 3, 4]),  # the help to unmask 2, and the keys of 4
    ],
)
def test_a_client_whose_message_was_lost_comes_back(tiny, kind, replies):
    done = run(tiny(**FIVE), CLIENTS, fault=lose_wave(kind, 2, 1))
    assert [row["aggregated"] for row in done.rows] == [True] * 5
    assert [row["replies"] for row in done.rows] == replies
    assert waves(done) == [SET_UP + 2, 2, 2, 2, 2]
    assert sorted(map(len, by_dataset(ledger_entries()).values())) == [4, 5, 5, 5]


@pytest.mark.parametrize("stage", ["advertise", "share"])
def test_a_later_stage_that_fails_does_not_spoil_the_present_round(tiny, stage):
    """Too few are left in attempt 3 each time it is asked for: it fails, and no other."""
    done = run(tiny(**FIVE | {"min-replies": 3}), CLIENTS, fault=lose(stage, 3, 0, 1))
    assert [row["aggregated"] for row in done.rows] == [True, True, False, True, True]
    assert [row["replies"] for row in done.rows] == [4, 4, 0, 4, 4]
    assert waves(done) == [4, 2, 1 if stage == "advertise" else 2, 4, 2]
    assert [len(book) for book in by_dataset(ledger_entries()).values()] == [4] * CLIENTS


def test_shares_lost_on_the_way_are_asked_for_again(tiny):
    """The pipeline has no shares for attempt 3, and its set-up has: no attempt fails."""
    losing = lose("share", 3, 0, 1)

    def fault(now, partition, reply):
        return losing(now, partition, reply) if now == 2 else reply

    done = run(tiny(**FIVE | {"min-replies": 3}), CLIENTS, fault=fault)
    assert [row["replies"] for row in done.rows] == [CLIENTS] * 5
    assert waves(done) == [4, 2, SET_UP + 2, 2, 2]
    assert any("share: the reply lacks" in reason for reason in done.rows[2]["dropped"])


def test_keys_go_to_the_cohort_of_the_attempt_they_are_for(tiny):
    """Two thirds of six clients take part in an attempt; the others get later stages only."""
    done = run(tiny(**open_run(6) | ON | {"fraction-train": 0.67, "num-server-rounds": 5}), 6)
    assert [row["replies"] for row in done.rows] == [4] * 5
    assert waves(done) == [SET_UP + 2, 2, 2, 2, 2]
    asked = cohorts(done.grid)
    assert len({frozenset(cohort) for cohort in asked.values()}) > 1
    for exchange in done.grid.exchanges:
        for attempt in (stages_of(exchange.request) if exchange.attempt else {}).values():
            assert exchange.partition in asked[attempt]
