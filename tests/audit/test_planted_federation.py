"""The audit's federation is the app's own: same bits after a run, and a change of one changes both.

Without canaries, and with the app's seeded streams, the audit's clients and server must compute
what a run of both apps over a network in process computes.
"""

from dataclasses import replace

import numpy as np
import pytest

from helpers.app_runs import do_not_wait_for_nodes, of_kind, run, same_bits
from lalora_app.audit import draw_estimates
from lalora_app.audit.planted_federation import Federation, mislabelled
from lalora_app.audit.run_attack import audit_run
from lalora_app.client import limits, local_round, requests
from lalora_app.methods.method import Method
from lalora_app.methods.schedule import only_b
from lalora_app.methods.table import METHODS
from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.results.run_folder import RunFolder

CLIENTS, ROUNDS = 3, 3


@pytest.fixture(autouse=True)
def nodes_are_there(monkeypatch):
    do_not_wait_for_nodes(monkeypatch)


@pytest.fixture
def config_of(tiny):
    """Config of a short seeded run of three clients with noise."""

    def build(method, **changes):
        base = {"num-server-rounds": ROUNDS, "privacy.noise": "seeded", "privacy.epsilon": 3.0}
        return tiny(method=method, **base | changes)

    return build


def without_canaries(config, folder, clients=CLIENTS):
    return Federation(config, mislabelled(config, 0), np.zeros(0, bool), clients, 0, folder)


def with_app_streams(config, federation):
    """Let the federation draw batches and noise as the clients of a seeded run do."""
    federation.streams = lambda index, attempt: requests._streams(
        config, federation.clients[index].site.client, attempt
    )
    return federation


def finished(federation):
    seen = list(federation.rounds())
    return federation.state, seen


CASES = {
    "residents wait on the clients": ("la-lora", {}),
    "the base moves": ("flora", {}),
    "the base moves by rounds": ("galore-dwa", {}),
    "weights are perturbed": ("flat-lora", {}),
    "masks before the first round": ("losa", {}),
    "a factor never travels but in the last round": ("fedsa-lora", {}),
    "ranks differ": ("hetlora", {"lora.ranks": "1,2"}),
    "cohorts of two": ("la-lora", {"fraction-train": 0.67}),
    "a robust mean": ("dp-lora", {"robust": "median"}),
    "the server steps": ("la-lora", {"server.optimizer": "adam", "server.lr": 0.01}),
}


# One with resident factors, one that moves the base, one with cohorts; the others are "wide".
FAST = {"residents wait on the clients", "the base moves", "cohorts of two"}


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.wide) for c in CASES]
)
def test_the_audits_federation_computes_the_bits_of_the_app(config_of, tmp_path, case):
    method, changes = CASES[case]
    config = config_of(method, **changes)
    done = run(config, CLIENTS)
    app = RunFolder(done.folder.path).latest()
    federation = with_app_streams(config, without_canaries(config, tmp_path / "audit"))
    state, seen = finished(federation)
    assert same_bits(state.adapter, app.adapter)
    assert same_bits(state.drift, app.drift)
    assert (state.round, state.versions) == (app.round, app.versions)
    asked = [e for e in done.grid.trained() if e.partition == 0]
    assert [own.t for own in seen] == [e.attempt for e in asked]
    for own, exchange in zip(seen, asked, strict=True):
        assert same_bits(own.received, exchange.start)
        assert same_bits(own.drift, exchange.drift)
    assert federation.epsilon == pytest.approx(done.rows[-1]["epsilon_max"], abs=0.011)


def adapters_after(federation):
    return finished(federation)[0].adapter


def test_a_change_of_the_schedule_changes_the_audit(config_of, tmp_path, monkeypatch):
    config = config_of("dp-lora")
    honest = without_canaries(config, tmp_path / "honest")
    assert {frozenset(seen.sent) for seen in honest.rounds()} == {frozenset({"A", "B", "head"})}
    monkeypatch.setattr(Method, "sent", lambda self, t, last: only_b(t))
    changed = without_canaries(config, tmp_path / "changed")
    start = changed.state.adapter
    assert {frozenset(seen.sent) for seen in changed.rounds()} == {frozenset({"B", "head"})}
    assert same_bits(of_kind(changed.state.adapter, "A"), of_kind(start, "A"))
    assert not same_bits(of_kind(honest.state.adapter, "A"), of_kind(start, "A"))


def test_a_change_of_the_learning_rates_changes_the_audit_and_its_attack(
    config_of, tmp_path, monkeypatch
):
    config = config_of("dp-lora")
    honest = without_canaries(config, tmp_path / "honest")
    (first, *_) = honest.rounds()
    rates = local_round.learning_rates

    def doubled(*args):
        return {which: 2 * rate for which, rate in rates(*args).items()}

    monkeypatch.setattr(local_round, "learning_rates", doubled)
    (twice, *_) = without_canaries(config, tmp_path / "changed").rounds()
    head = next(name for name in first.change if of_kind({name: 0}, "head"))
    assert np.abs(twice.change[head]).max() > 1.5 * np.abs(first.change[head]).max()
    assert draw_estimates.learning_rates is rates  # the one function, by name


def test_a_change_of_the_server_rule_changes_the_audit(config_of, tmp_path, monkeypatch):
    config = config_of("dp-lora")
    average = METHODS["dp-lora"].aggregate

    def negated(*args):
        new = average(*args)
        return replace(new, adapter={name: -array for name, array in new.adapter.items()})

    monkeypatch.setitem(METHODS, "dp-lora", replace(METHODS["dp-lora"], aggregate=negated))
    federation = without_canaries(config, tmp_path)
    uploads = []
    rule = federation._server.method.aggregate

    def spied(state, shares, kept, info):
        uploads.append(kept)
        return rule(state, shares, kept, info)

    federation._server.method = replace(federation._server.method, aggregate=spied)
    after = adapters_after(federation)
    for name, array in after.items():
        mean = np.mean([upload[name] for upload in uploads[-1]], axis=0)
        np.testing.assert_allclose(array, -mean, rtol=1e-5, atol=1e-7)


def test_a_change_of_the_reservation_changes_the_audit(config_of, tmp_path, monkeypatch):
    config = config_of("dp-lora")
    federation = without_canaries(config, tmp_path / "honest")
    seen = list(federation.rounds())
    size, steps = len(federation.victim.data), config.train.local_steps
    rate = config.train.batch_size / size
    noise = calibrate(3.0, config.privacy.delta, sampling_rate=rate, steps=ROUNDS * steps)
    for own in seen:
        assert own.reservation.sampling_rate == rate
        assert own.reservation.noise_multiplier == pytest.approx(noise)
    spent = epsilon([Release(rate, noise, ROUNDS * steps)], config.privacy.delta)
    assert federation.epsilon == pytest.approx(spent)
    monkeypatch.setattr(limits, "noise_for", lambda *args, **kwargs: 7.0)
    changed = without_canaries(config, tmp_path / "changed")
    assert {own.reservation.noise_multiplier for own in changed.rounds()} == {7.0}


def test_a_victim_that_is_not_in_every_cohort_is_attacked_in_its_own_rounds(config_of, tmp_path):
    config = config_of("la-lora", **{"fraction-train": 0.67, "num-server-rounds": 6})
    members = np.ones(6, bool)
    federation = Federation(config, mislabelled(config, 6), members, CLIENTS, 0, tmp_path)
    asked = [0 in cohort for cohort in federation._server.clients.cohorts]
    seen = list(federation.rounds())
    assert [own.t for own in seen] == [t for t, own in enumerate(asked, start=1) if own]
    assert len(seen) == 4
    steps = config.train.local_steps
    assert len(federation.victim.data.drawn) == 4 * steps
    assert [own.steps["head"] for own in seen] == [
        list(range(i * steps, (i + 1) * steps)) for i in range(4)
    ]
    found = audit_run(config, canaries=6, clients=CLIENTS, seed=0, confidence=0.95)
    assert sorted({part.t for part in found.parts}) == [own.t for own in seen]
    assert found.ledger == pytest.approx(federation.epsilon)
