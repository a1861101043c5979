"""Test sums of integers with shared noise: exact, and with the noise that missing clients leave."""

from itertools import product

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.secagg_parties import Parties, copied
from lalora_app.secagg import client, masks, noise_seeds, shamir
from lalora_app.secagg.messages import StageError, mapping_of
from lalora_app.shared_noise.lattice import Constants, Lattice, to_words
from lalora_app.shared_noise.seeded import component, share, without_excess
from lalora_app.shared_noise.shares import Cohort

STAGES = ("advertise", "share", "train", "unmask")
ENTRIES = 6
NOBODY: dict[str, list[int]] = {stage: [] for stage in STAGES}


def lattice_of(cohort, word):
    run = Constants(1.0, 1.0, 0.1, 1000, ENTRIES, 10, 1.0, 1e-5, cohort)
    return Lattice(run, 2.0**-6, word)


def integers_of(parties, lattice, word):
    """Each client's integers: random up to the whole range, so that sums wrap around."""
    rng = np.random.default_rng(len(parties.open))
    half = 2 ** (word - 1)
    return {c: rng.integers(-half, half, ENTRIES, np.int64) for c in parties.open}


@settings(max_examples=20, deadline=None)
@given(
    where=st.lists(st.sampled_from([*STAGES, None, None, None]), min_size=3, max_size=7),
    colluding=st.integers(0, 3),
    word=st.sampled_from([32, 64]),
)
def test_the_sum_is_exact_and_keeps_the_noise_that_it_needs(where, colluding, word):
    lost = {stage: [c for c, at in enumerate(where) if at == stage] for stage in STAGES}
    parties = Parties(len(where), colluding)
    directory = len(where) - len(lost["advertise"])
    possible = colluding <= directory - 2
    cohort = Cohort.of(directory, colluding) if possible else None
    sharing = directory - len(lost["share"])
    assert parties.set_up(lost) == bool(cohort and sharing >= cohort.threshold)
    if not parties.open:
        return
    lattice = lattice_of(cohort, word)
    integers = integers_of(parties, lattice, word)
    seeds = {c: attempt.noise_seeds for c, attempt in parties.open.items()}
    words = {c: to_words(x + share(seeds[c], lattice), word) for c, x in integers.items()}
    masked = {c: v for c, v in parties.vectors(words).items() if c not in lost["train"]}
    if len(masked) < cohort.threshold:
        assert parties.session.unmask(masked) == []
        return
    if len(masked) - len(set(lost["unmask"]) & set(masked)) < cohort.threshold:
        return  # too few answer, as the test of the runs has it
    total, revealed = parties.unmask(masked, lost["unmask"])
    missing = directory - len(masked)
    needed = cohort.needed(missing)
    assert np.array_equal(total, sum(words[c] for c in masked))
    assert set(revealed) == (set(masked) if needed < cohort.removable else set())
    assert all(seed == seeds[c][needed + 1] for c, seed in revealed.items())
    left = without_excess(total, revealed, missing, lattice)
    noise = sum(component(seeds[c][k], k, lattice) for c in masked for k in range(needed + 1))
    assert np.array_equal(left, to_words(sum(integers[c] for c in masked) + noise, word))
    assert parties.session.drop_reasons == []


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
def test_the_sum_is_exact_without_shared_noise(word):
    parties = Parties(4)
    assert parties.set_up(NOBODY | {"share": [3]})
    words = {c: np.arange(ENTRIES, dtype=word) - word(c) for c in parties.open}
    total, revealed = parties.unmask(parties.vectors(words))
    assert np.array_equal(total, words[0] + words[1] + words[2])
    assert (total.dtype, revealed) == (word, {})
    assert all(attempt.noise_seeds == () for attempt in parties.open.values())
    assert all(attempt.colluding is None for attempt in parties.open.values())


def masked_by_all(clients, colluding=0):
    parties = Parties(clients, colluding)
    assert parties.set_up(NOBODY)
    words = {c: np.full(ENTRIES, c, np.uint32) for c in parties.open}
    return parties, parties.vectors(words)


def opened(shares):
    """Return the secret of some shares, or nothing if the padding is wrong."""
    try:
        return shamir.combine(shares)
    except ValueError:
        return None


@pytest.mark.parametrize("colluding", [None, 0, 2])
def test_a_secret_of_a_client_takes_as_many_holders_as_the_attempt_needs(colluding):
    parties = Parties(7, colluding)
    assert parties.set_up(NOBODY)
    states = {c: attempt.state for c, attempt in parties.open.items()}
    for owner, state in states.items():
        secret = {"seed_shares": state.seed, "key_shares": state.mask_key}
        secret |= {"noise_shares": state.noise_seeds[1]} if colluding is not None else {}
        for name, value in secret.items():
            held = [getattr(s, name)[owner][: noise_seeds.SHARE_BYTES] for s in states.values()]
            assert opened(held[: state.threshold - 1]) != value
            assert opened(held[: state.threshold]) == value


def answer(context, arrived, lost):
    order = {"run": "run-1", "attempt": 1, "arrived": list(arrived), "lost": list(lost)}
    return client.unmask(ConfigRecord(order), context)


def test_an_attempt_masks_one_vector():
    parties, _ = masked_by_all(3)
    with pytest.raises(StageError, match="one vector"):
        parties.vectors({0: np.zeros(ENTRIES, np.uint32)})


def test_the_first_seed_is_kept_and_the_others_are_deleted_after_the_upload():
    parties, _ = masked_by_all(5)
    (record,) = [r for n, r in parties.contexts[0].state.items() if n == "secagg-1"]
    kept = repr(dict(record))
    attempt = parties.open[0]
    assert len(attempt.noise_seeds) == 2
    assert not any(repr(seed) in kept for seed in attempt.noise_seeds)
    held = {c: parties.open[c].state.noise_shares[0] for c in parties.open}
    assert {len(joined) for joined in held.values()} == {noise_seeds.SHARE_BYTES}
    shares = {c: noise_seeds.share_of(joined, 1) for c, joined in held.items()}
    found = masks.reconstruct_secret(shares, Cohort.of(5).threshold)
    assert found == attempt.noise_seeds[1] != attempt.noise_seeds[0]


def test_a_client_told_two_lists_answers_once():
    parties, _ = masked_by_all(5)
    answer(parties.contexts[0], [0, 1, 2, 3, 4], [])
    with pytest.raises(StageError):
        answer(parties.contexts[0], [0, 1, 2, 3], [4])
    with pytest.raises(StageError):
        answer(parties.contexts[0], [0, 1, 2, 3, 4], [])


def test_a_client_counts_who_is_missing_by_itself():
    """One has sent keys only, and is in no list of the server; one vector was lost."""
    parties = Parties(8, 0)
    assert parties.set_up(NOBODY | {"share": [7]})
    parties.vectors({c: np.zeros(ENTRIES, np.uint32) for c in parties.open})
    assert Cohort.of(8).levels == (0, 1, 2)
    given = answer(copied(parties.contexts[0]), [0, 1, 2, 3, 4, 5], [6])
    assert mapping_of(given, "noise") == {}
    given = answer(copied(parties.contexts[0]), [0, 1, 2, 3, 4, 5, 6], [])
    wanted = {c: parties.open[0].state.noise_shares[c] for c in range(7)}
    assert mapping_of(given, "noise") == {
        c: noise_seeds.share_of(joined, 2) for c, joined in wanted.items()
    }


def opened_by(parties, lists, attackers, assignment):
    """Which seeds of client 0 an attacker gets if each honest client is told one of two lists."""
    honest = [c for c in parties.open if c not in attackers]
    told = dict(zip(honest, assignment, strict=True))
    cohort = parties.open[0].state.cohort
    found = set()
    for which, missing in lists.items():
        number = cohort.needed(missing) + 1
        helpers = {*attackers, *(c for c in honest if told[c] == which)}
        if number <= cohort.removable and len(helpers) >= cohort.threshold:
            held = {c: parties.open[c].state.noise_shares[0] for c in helpers}
            shares = {c: noise_seeds.share_of(joined, number) for c, joined in held.items()}
            committed = parties.session.noise_commitments[0]
            noise_seeds.verified(shares, number, cohort, committed)
            found.add(which)
        elif number > cohort.removable and len(helpers) >= cohort.threshold:
            found.add(which)  # a sum that needs all of the noise
    return found


@pytest.mark.parametrize(("clients", "colluding"), [(4, 0), (5, 0), (5, 1), (6, 0), (6, 1), (7, 2)])
def test_two_numbers_of_missing_clients_cannot_both_be_answered(clients, colluding):
    parties, _ = masked_by_all(clients, colluding)
    most = parties.open[0].state.cohort.most_missing
    attackers = range(clients - 1 - colluding, clients)
    for missing in range(1, most + 1):
        lists = {"none": 0, "some": missing}
        for assignment in product(lists, repeat=clients - len(attackers)):
            found = opened_by(parties, lists, attackers, assignment)
            assert found != {"none", "some"}, (missing, assignment)


def test_the_brute_force_finds_a_threshold_that_is_too_small():
    """With as many attackers as two sets of clients have in common, some assignment opens both."""
    parties, _ = masked_by_all(8, 0)
    lists, attackers = {"none": 0, "some": 2}, range(4, 8)
    found = [opened_by(parties, lists, attackers, told) for told in product(lists, repeat=4)]
    assert {"none", "some"} in found


def reversed_noise(client, reply):
    """The first client sends noise shares with the bytes of each reversed."""
    shares = [share[:4] + share[:3:-1] for share in reply["noise"]]
    return reply | {"noise": shares} if client == 0 else reply


def no_noise(client, reply):
    return reply | {"noise": []} if client < 3 else reply


@pytest.mark.parametrize("change", [reversed_noise, no_noise])
def test_a_wrong_share_of_a_noise_seed_costs_noise_and_nothing_else(change):
    parties, masked = masked_by_all(5)
    total, revealed = parties.unmask(masked, change=change)
    assert np.array_equal(total, np.full(ENTRIES, 0 + 1 + 2 + 3 + 4, np.uint32))
    assert revealed == {}
    told = [r.partition(":")[0] for r in parties.session.drop_reasons]
    assert told[-5:] == [f"noise of client {c} stays in the sum" for c in range(5)]


def test_a_client_with_a_wrong_commitment_keeps_its_noise_alone():
    parties = Parties(5, 0)
    parties.ask(parties.session.advertise())
    parties.ask(
        parties.session.share(),
        change=lambda client, reply: reply | {"noise": bytes(32)} if client == 3 else reply,
    )
    parties.open_all()
    words = {c: np.full(ENTRIES, c, np.uint32) for c in parties.open}
    total, revealed = parties.unmask(parties.vectors(words))
    assert np.array_equal(total, np.full(ENTRIES, 10, np.uint32))
    assert set(revealed) == {0, 1, 2, 4}
    (told,) = parties.session.drop_reasons
    assert told.startswith("noise of client 3 stays in the sum")


def test_two_clients_with_one_chain_of_seeds_do_not_stop_the_run():
    parties, masked = masked_by_all(5)
    for kept in (parties.session.noise_commitments, parties.session.commitments):
        assert len(set(kept.values())) == 5
    (part,) = parties.session.unmask(masked)
    parties.ask(part)
    session = parties.session
    session.noise_commitments[1] = session.noise_commitments[0]
    session.noise_revealed[1] = session.noise_revealed[0]
    assert set(session.noise_seeds()) == {0, 2, 3, 4}
    assert session.drop_reasons == [
        "noise of client 1 stays in the sum: two clients have one noise seed"
    ]
