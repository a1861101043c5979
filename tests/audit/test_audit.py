"""The audit: its bounds against mechanisms of known ε, and the broken steps that it must catch."""

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

import helpers.shared_accounting  # noqa: F401
from conftest import make_config
from lalora_app.audit import one_audit, published_mechanism, step_attack
from lalora_app.audit.broken_mechanisms import BROKEN
from lalora_app.audit.canaries import SPREAD, Canaries
from lalora_app.audit.estimators import (
    AttackErrors,
    Guesses,
    at_most,
    counted_p_value,
    gaussian,
    gaussian_epsilon,
    one_run,
    roc,
    subsampled,
    two_sided,
)
from lalora_app.audit.findings import SURE, AuditReport, AuditRow
from lalora_app.audit.step_attack import (
    ATTACKS,
    Observed,
    attack_errors,
    bounded,
    guessed,
    likelihood,
    observe,
    observe_single_canary,
    side_by_side,
)
from lalora_app.cli import argument_types, main
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.counted_releases import CountedReleases, counted_releases
from lalora_app.private_step.mechanism import CLIP_MARGIN, clipped_sum
from lalora_app.private_step.step import private_gradient
from lalora_app.results.model_card import privacy_sentence
from lalora_app.results.run_folder import RunFolder

DELTA = 1e-5
SHAPES = {f"layer.{i}.lora_B.weight": (64, 8) for i in range(12)} | {"head": (3,)}
RATE, ROUNDS, STEPS = 64 / 1079, 10, 4  # of the first client of the default run


@cache
def plan_at(eps: float) -> CountedReleases:
    """The default run's releases at ε, and their composition in the ledger."""
    return counted_releases(Limit(eps, DELTA), rate=RATE, rounds=ROUNDS, steps=STEPS, clip_norm=0.5)


def normal_games(mu: float, canaries: int, seed: int) -> Observed:
    """Exact draws of the Gaussian mechanism with sensitivity 1 and noise 1/mu."""
    rng = np.random.default_rng(seed)
    members = rng.random(canaries) < 0.5
    x = members + rng.standard_normal(canaries) / mu
    return Observed(x[None], np.full((1, 1), 1 / mu), members)


# --- the estimators ----------------------------------------------------------------------------


def test_gaussian_dp_is_that_of_the_accountant():
    for mu in (0.3, 1.0, 2.0):
        assert gaussian_epsilon(mu, DELTA) == pytest.approx(
            epsilon([Release(1.0, 1 / mu, 1)], DELTA), abs=0.01
        )
    assert gaussian_epsilon(0.0, DELTA) == gaussian_epsilon(-1.0, DELTA) == 0.0


def test_clopper_and_pearson_cover_at_their_level():
    assert at_most(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert at_most(100, 100, 0.95) == 1.0
    events = np.arange(101)
    bounds = np.array([at_most(int(k), 100, 0.95) for k in events])
    for chance in (0.01, 0.2, 0.5, 0.93):
        covered = stats.binom(100, chance).pmf(events)[bounds >= chance].sum()
        assert covered >= 0.95


def randomised_response(eps: float, seed: int) -> Guesses:
    """Every guess is right with the largest chance that pure ε-DP allows."""
    count = 5000
    right = np.random.default_rng(seed).random(count) < 1 / (1 + math.exp(-eps))
    return Guesses(int(right.sum()), count, count)


@pytest.mark.parametrize("eps", [0.5, 3.0])
def test_one_run_is_tight_for_randomised_response_and_seldom_above(eps):
    bounds = [one_run(randomised_response(eps, seed), 0.0, 0.95) for seed in range(100)]
    above = sum(bound > eps for bound in bounds)
    assert above <= stats.binom(100, 0.05).ppf(0.999)
    assert np.mean(bounds) > 0.8 * eps


def test_one_run_knows_chance_and_pays_for_delta():
    assert one_run(Guesses(500, 1000, 1000), 0.0, 0.95) == 0.0
    assert one_run(Guesses(1, 2, 1000), 0.0, 0.95) == 0.0
    sure = Guesses(100, 100, 1000)
    free, paid = (one_run(sure, delta, 0.95) for delta in (0.0, 1e-3))
    assert free == pytest.approx(-math.log(0.05 ** (-1 / 100) - 1), abs=1e-3)
    assert 0 <= paid < free


@pytest.mark.parametrize(("eps", "share"), [(1.0, 0.8), (3.0, 0.85), (8.0, 0.85)])
def test_on_exact_gaussian_draws_no_bound_is_above_and_the_curve_reaches_its_share(eps, share):
    mu = brentq(lambda m: gaussian_epsilon(m, DELTA) - eps, 0.1, 3.0)
    above, reached = {"two": 0, "gdp": 0, "one": 0}, []
    for seed in range(20):
        seen = normal_games(mu, 40_000, seed)
        scores = likelihood(seen, 1.0)
        errors = attack_errors(scores, seen.members)
        bounds = {
            "two": two_sided(errors, DELTA, 0.95),
            "gdp": gaussian(errors, DELTA, 0.95),
            "one": one_run(guessed(scores, seen.members, 0.03), DELTA, 0.95),
        }
        for name, bound in bounds.items():
            above[name] += bound > eps
        reached.append(bounds["gdp"] / eps)
    assert max(above.values()) <= stats.binom(20, 0.05).ppf(0.999)
    assert np.mean(reached) > share


def test_the_curve_of_the_composition_is_met_from_below():
    release = plan_at(3.0).release
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        members = rng.random(60_000) < 0.5
        hits = rng.random((release.count, len(members))) < release.sampling_rate
        x = hits * members + release.noise_multiplier * rng.standard_normal(hits.shape)
        noise = np.full((release.count, 1), release.noise_multiplier)
        scores = likelihood(Observed(x, noise, members), release.sampling_rate)
        found = subsampled(
            attack_errors(scores, members),
            DELTA,
            0.999,
            sampling_rate=release.sampling_rate,
            steps=release.count,
        )
        assert 0.8 * plan_at(3.0).epsilon < found <= plan_at(3.0).epsilon


def test_useless_attacks_prove_nothing():
    coin = AttackErrors(500, 1000, 500, 1000)
    assert two_sided(coin, DELTA, 0.95) == gaussian(coin, DELTA, 0.95) == 0.0
    assert subsampled(coin, DELTA, 0.95, sampling_rate=0.05, steps=40) == 0.0
    worse = AttackErrors(900, 1000, 900, 1000)
    assert gaussian(worse, DELTA, 0.95) == 0.0


# --- the canaries ------------------------------------------------------------------------------


def test_canaries_are_orthogonal_and_clipped_to_the_clip_norm():
    import torch

    canaries = Canaries(SHAPES, np.ones(100, bool), 28, clip_norm=0.5)
    rows = canaries.gradients(torch.arange(100)).blocks[0].rows
    gram = (rows @ rows.T).numpy()
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-3 * gram.max()
    spread = rows[:, : SPREAD * 512].reshape(100, SPREAD, 512).norm(dim=2)
    assert torch.allclose(spread, spread[0, 0].expand_as(spread))  # an equal part in each tensor
    single = canaries.gradients(torch.tensor([7]))
    along = canaries.projected(clipped_sum(single, 0.5))
    expected = np.zeros(128)
    expected[7] = CLIP_MARGIN
    np.testing.assert_allclose(along, expected, atol=1e-5)


@pytest.mark.parametrize("clip_norm", [1e-6, 1e-3, 0.5, 1e6])
def test_automatic_clipping_brings_a_canary_to_almost_the_clip_norm(clip_norm):
    import torch

    canaries = Canaries(SHAPES, np.ones(100, bool), 28, clip_norm)
    along = canaries.projected(
        clipped_sum(canaries.gradients(torch.tensor([7])), clip_norm, "automatic")
    )
    expected = np.zeros(128)
    expected[7] = 1
    np.testing.assert_allclose(along, expected, atol=0.011)


def test_the_audit_of_a_step_clips_as_the_run_does(monkeypatch):
    seen = []

    def spied(*args, clipping, **named):
        seen.append(clipping)
        return private_gradient(*args, clipping=clipping, **named)

    monkeypatch.setattr(step_attack, "private_gradient", spied)
    plan = replace(plan_at(3.0), clipping="automatic")
    observed = observe(plan, SHAPES, 1000, 0, blanks=3000)
    assert set(seen) == {"automatic"}
    inside = observed.x[:, observed.members].mean()
    assert inside == pytest.approx(plan.release.sampling_rate, abs=0.04)


def test_more_canaries_than_directions_are_refused():
    with pytest.raises(ValueError, match=r"canaries=4097 .* must fit"):
        Canaries(SHAPES, np.ones(4097, bool), 0, 0.5)


# --- the real step -----------------------------------------------------------------------------


def test_the_attacker_sees_the_promised_noise_and_the_canaries():
    plan = plan_at(3.0)
    seen = observe(plan, SHAPES, 1000, 0, blanks=3000)
    assert seen.x.shape == (ROUNDS * STEPS, 1000)
    assert seen.noise.mean() == pytest.approx(plan.release.noise_multiplier, rel=0.02)
    out = seen.x[:, ~seen.members]
    assert abs(out.mean()) < 5 * plan.release.noise_multiplier / math.sqrt(out.size)
    inside = seen.x[:, seen.members].mean()
    assert inside == pytest.approx(plan.release.sampling_rate, abs=0.04)


def test_the_ledger_has_counted_what_is_released():
    plan = plan_at(3.0)
    assert plan.epsilon == epsilon([plan.release], DELTA)
    assert 2.99 < plan.epsilon <= 3


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1.0, 3.0, 8.0])
def test_no_seed_of_twenty_proves_more_than_the_ledger_counts(eps):
    for seed in range(20):
        plan = plan_at(eps)
        seen = observe(plan, SHAPES, 3840, seed, blanks=256)
        assert bounded(seen, plan, 0.95).epsilon <= plan.epsilon


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1.0, 3.0, 8.0])
def test_on_the_plain_gaussian_the_real_step_is_audited_to_eighty_percent(eps):
    plan = counted_releases(Limit(eps, DELTA), rate=1.0, rounds=1, steps=1, clip_norm=0.5)
    runs = [observe(plan, SHAPES, 3840, seed, blanks=256) for seed in range(40)]
    scores = likelihood(side_by_side(runs), 1.0)
    errors = attack_errors(scores, side_by_side(runs).members)
    for bound in (
        gaussian(errors, DELTA, 0.95),
        subsampled(errors, DELTA, 0.95, sampling_rate=1.0, steps=1),
    ):
        assert 0.8 * eps <= bound <= eps


# --- the broken steps --------------------------------------------------------------------------

CAUGHT = [name for name in BROKEN if name not in ("shuffled-in-secret", "empty-batches-skipped")]
WIDE = {f"layer.{i}.lora_B.weight": (192, 8) for i in range(12)}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_broken_step_proves_more_than_the_ledger_counts(name):
    plan, broken = plan_at(1.0), BROKEN[name]
    seen = observe(plan, WIDE, 12_000, 0, blanks=256, step=broken.make())
    found = bounded(seen, plan, 0.95, ATTACKS | dict(broken.attacks))
    unlikely = counted_p_value(found.errors, [plan.release]) < SURE
    assert unlikely if name == "half-noise" else found.epsilon > plan.epsilon


def test_the_real_step_errs_as_much_as_what_was_counted():
    plan = plan_at(1.0)
    found = bounded(observe(plan, WIDE, 12_000, 0, blanks=256), plan, 0.95)
    assert counted_p_value(found.errors, [plan.release]) > 1e-3
    assert found.epsilon <= plan.epsilon


@pytest.mark.slow
def test_skipped_empty_batches_show_where_the_canary_is_the_only_record():
    plan, broken = plan_at(1.0), BROKEN["empty-batches-skipped"]
    found = bounded(observe_single_canary(plan, 200, 0, step=broken.make()), plan, 0.95)
    assert found.epsilon > plan.epsilon
    honest = bounded(observe_single_canary(plan, 200, 0), plan, 0.95)
    assert honest.epsilon <= plan.epsilon


@pytest.mark.parametrize("relative_norm", [1.0, 100.0])
def test_one_step_of_the_published_mechanism_gives_its_example_away(relative_norm):
    setting = published_mechanism.Setting(relative_norm=relative_norm)
    found = published_mechanism.attacked(setting, 2000, 0)
    assert found.errors.false_alarms + found.errors.misses == 0
    assert found.bound(DELTA, 0.95) > 6


def test_the_published_clip_is_that_of_the_batch_and_its_median():
    setting = published_mechanism.Setting(batch=2, tensors=3, entries=1, noise=0.5, cap=0.4)
    gradients = np.array([[[0.2], [4.0], [0.4]], [[0.2], [2.0], [0.2]]])
    mean, deviation = published_mechanism.clipped_mean(gradients, setting)
    np.testing.assert_allclose(mean[:, 0], [0.2, 0.3, 0.3])  # the median norm is 0.3
    assert deviation == pytest.approx(0.5 * 0.3 / 2)
    capped, _ = published_mechanism.clipped_mean(10 * gradients, setting)
    np.testing.assert_allclose(capped[:, 0], 0.4)


# --- the report and the command ----------------------------------------------------------------


def report(lower: float, p_value: float = 0.3) -> AuditReport:
    rows = [AuditRow("step", lower, 2.9, "guesses", p_value), AuditRow("run", 0.0, None, "guesses")]
    return AuditReport("lalora", 3.0, 0.95, DELTA, 4, rows)


def test_the_report_has_both_epsilons_and_a_verdict():
    found = json.loads(report(1.5).json())
    names = ("epsilon_upper", "epsilon_lower", "confidence", "mechanism", "seed")
    assert [found[name] for name in names] == [3.0, 1.5, 0.95, "lalora", 4]
    step = {"epsilon": 1.5, "curve": 2.9, "p_value": 0.3, "roc": []}
    assert found["parts"]["step"] == step
    assert "consistent" in report(1.5).text()
    assert (report(1.5).broken, report(3.1).broken) == (False, True)
    assert "BROKEN: more is proved than promised" in report(3.1).text()
    assert report(1.5, p_value=1e-5).broken
    assert "not the mechanism that was counted" in report(1.5, p_value=1e-5).text()
    assert "BROKEN" in report(3.1).card_row()
    assert "BROKEN" not in report(1.5).card_row()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mechanism", "magic"], ['mechanism="magic"', "must be one of", "per-layer-clip"]),
        (["--epsilon", "inf"], ["epsilon=inf", "must be finite"]),
    ],
)
def test_a_bad_request_is_refused_at_once(options, words, capsys):
    assert main.main(["audit", *options]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_the_command_fails_for_the_published_mechanism(capsys):
    options = ["--mechanism", "la-lora-published", "--fast", "--json", "--epsilon", "1"]
    assert main.main(["audit", *options]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon_upper"] == 1.0
    assert found["epsilon_lower"] > 6
    assert found["mechanism"] == "la-lora-published"


def test_a_roc_has_one_point_a_threshold_and_begins_at_one_false_alarm():
    scores = np.array([9.0, 8.0, 8.0, 7.0, 1.0, 0.0])
    members = np.array([True, True, False, True, False, False])
    third = 1 / 3
    assert roc(scores, members) == pytest.approx(
        np.array([(third, 1.0), (2 * third, 1.0), (1.0, 1.0)])
    )
    assert roc(np.zeros(6), members) == [(1.0, 1.0)]
    many = np.random.default_rng(0).normal(size=10_000)
    found = np.array(roc(many, np.arange(10_000) % 2 == 0))
    assert len(found) <= 60
    assert found[0, 0] == 1 / 5000
    assert (np.diff(found, axis=0) >= 0).all()
    assert np.abs(found[:, 0] - found[:, 1]).max() < 0.05


def finished_run(folder, config):
    """A folder as a finished run leaves it, as far as an audit reads it."""
    run = RunFolder(folder)
    run.adapter.mkdir(parents=True)
    run.write_config(config)
    row = {"attempt": 1, "aggregated": True, "upload_bytes": 8, "epsilon_max": 2.9}
    run.write_history([row | {"accuracy": 0.5}])
    summary = {"upload_bytes_per_round": 8, "download_bytes_per_round": 8, "seconds": 1.0}
    scores = {"method": "la-lora", "delta": 1e-5, "epsilon_max": 2.9, "accuracy": 0.5}
    run.write_json("summary.json", scores | summary)
    run.write_json("privacy.json", {"unit": "one example", "accountant": "PRV"})
    run.write_json("clients.json", {"clients": 3})
    (run.adapter / "README.md").write_text("# adapter\n" + privacy_sentence(config, 2.9), "utf-8")
    return folder


SMALL = one_audit.AuditSize(
    canaries=2000, runs=1, single_canary_runs=3, mislabelled=0, published_steps=100
)


@pytest.mark.slow
def test_an_audit_of_a_run_is_told_in_its_report_and_its_model_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(one_audit, "FAST", SMALL)
    folder = finished_run(tmp_path / "run", make_config(**{"privacy.epsilon": 2.0}))
    card = folder / "adapter" / "README.md"
    assert "| ε, upper bound (ledger) | 2.90" in card.read_text("utf-8")
    assert "| ε, lower bound (audit) | not audited" in card.read_text("utf-8")
    for _ in range(2):  # an audit replaces the one before
        assert main.main(["audit", "--fast", "--json", "--run", str(folder)]) == 0
        found = json.loads((folder / "audit.json").read_text("utf-8"))
        assert found == json.loads(capsys.readouterr().out)
        assert found["epsilon_upper"] == pytest.approx(2, abs=0.05)
        row = f"| ε, lower bound (audit) | {found['epsilon_lower']:.2f} at 95% confidence"
        assert card.read_text("utf-8").count(row) == 1
        assert "not audited" not in card.read_text("utf-8")
    page = (folder / "report.html").read_text("utf-8")
    assert f"at least {found['epsilon_lower']:.2f} at 95% confidence" in page
    assert "Membership attack" in page


@pytest.mark.parametrize(
    "options", [["--epsilon", "1"], ["--seeds", "0..1"], ["--mechanism", "half-noise"]]
)
def test_a_run_is_audited_as_it_was_and_once(tmp_path, options, capsys):
    assert main.main(["audit", "--run", str(tmp_path), *options]) == 2
    assert "must be audited as it was" in capsys.readouterr().err
    assert main.main(["audit", "--run", str(tmp_path / "none")]) == 2


def test_seeds_are_a_list_or_a_range():
    assert list(argument_types.to_seeds("0..19")) == list(range(20))
    assert argument_types.to_seeds("3,5") == [3, 5]
    assert argument_types.to_seeds("7") == [7]
