"""HetLoRA's clients with ranks that shrink: failed rounds, resumed runs, repeated requests."""

import numpy as np
import pytest

from helpers.app_runs import arrays, crash_after_training, interrupted, open_run, run, same_bits
from lalora_app.adapter.factors import factor_pairs
from lalora_app.settings.run_config import Config

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
DECAY, ROUNDS = 0.7, 5
# The penalty outweighs all gradients: AdamW moves each entry of the tail towards zero.
SHRINKING = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.ranks": "3,4",
    "num-server-rounds": ROUNDS,
    "privacy.noise": "seeded",
    "rule.rank-decay": DECAY,
    "rule.tail-penalty": 1e4,
}


def config_of(tiny, **changes) -> Config:
    return tiny(**open_run(method="hetlora") | SHRINKING | changes)


def tail_of(adapter, kept: int) -> float:
    pairs = [(adapter[b][:, kept:], adapter[a][kept:]) for b, a in factor_pairs(adapter)]
    return sum(float(np.linalg.norm(b) * np.linalg.norm(a)) for b, a in pairs)


def rank_of(adapter) -> int:
    (rank,) = {len(adapter[a]) for _, a in factor_pairs(adapter)}
    return rank


def ranks_by_attempt(done) -> dict[int, list[tuple[int, int]]]:
    """For each partition: (attempt, rank of its request)."""
    found: dict[int, list[tuple[int, int]]] = {}
    for exchange in done.grid.trained():
        entry = exchange.attempt, rank_of(exchange.start)
        found.setdefault(exchange.partition, []).append(entry)
    return found


def expected_ranks(done, first: int, partition: int, failed=()) -> list[int]:
    """The ranks of a client's requests, by the paper's rule from what travelled."""
    rank, expected = first, []
    for exchange in (e for e in done.grid.trained() if e.partition == partition):
        expected.append(rank)
        upload, kept = arrays(exchange.reply), max(1, int(DECAY * rank))
        shrunk = tail_of(upload, kept) < tail_of(exchange.start, kept)
        rank = kept if shrunk and exchange.attempt not in failed else rank
    return expected


def test_ranks_follow_the_tails_and_a_failed_attempt_changes_none(tiny):
    def fault(attempt, partition, reply):
        return None if attempt == 3 and partition == 1 else reply

    done = run(config_of(tiny), 2, fault=fault)
    assert [row["aggregated"] for row in done.rows] == [True, True, False, True, True]
    for partition, first in ((0, 3), (1, 4)):
        found = [rank for _, rank in ranks_by_attempt(done)[partition]]
        assert found == expected_ranks(done, first, partition, failed=(3,))
        assert found[-1] < first
        assert found[2] == found[3]
        told = [row["lowered_ranks"].get(str(partition), first) for row in done.rows]
        assert told[:-1] == found[1:]
    for exchange in done.grid.trained():
        assert rank_of(arrays(exchange.reply)) == rank_of(exchange.start)
    assert rank_of(done.folder.latest().adapter) == 4
    assert done.rows[-1]["upload_bytes"] < done.rows[0]["upload_bytes"]


def test_a_resumed_run_goes_on_with_the_ranks_and_repeats_its_replies(tiny, tmp_path):
    whole = run(config_of(tiny, output=str(tmp_path / "whole")), 2)
    crash = crash_after_training(4, clients=2)
    first, later = interrupted(config_of(tiny, output=str(tmp_path / "halves")), 2, fault=crash)
    second = run(later, 2)
    halves = ranks_by_attempt(first), ranks_by_attempt(second)
    for partition, found in ranks_by_attempt(whole).items():
        assert halves[0][partition] == found[:4]
        assert halves[1][partition] == found[3:]
    for exchange in second.grid.trained(4):
        (before,) = [e for e in first.grid.trained(4) if e.partition == exchange.partition]
        assert same_bits(arrays(exchange.reply), arrays(before.reply))
    assert same_bits(second.adapter, whole.adapter)
    assert second.folder.latest().ranks == whole.folder.latest().ranks != {}


def test_without_decay_no_rank_shrinks_and_the_penalty_changes_no_bit(tiny, tmp_path):
    still = {"rule.rank-decay": 1.0}
    one = run(config_of(tiny, output=str(tmp_path / "one"), **still), 2)
    two = run(config_of(tiny, output=str(tmp_path / "two"), **still | {"rule.tail-penalty": 0.0}))
    assert same_bits(one.adapter, two.adapter)
    assert one.folder.latest().ranks == {}
    assert {rank for _, rank in ranks_by_attempt(one)[0]} == {3}
