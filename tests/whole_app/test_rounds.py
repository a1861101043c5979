"""Test the start of a round, its random streams, and which clients take part."""

import pytest

from helpers.app_runs import (
    arrays,
    cohorts,
    damage,
    fresh,
    lose,
    of_kind,
    open_run,
    rounds_of,
    run,
    same_bits,
)
from lalora_app.privacy.ledger import state_folder

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


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
