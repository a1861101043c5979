"""Runs whose head starts at zero or by class means, and runs that train the head alone first."""

import numpy as np
import pytest

from helpers.app_runs import (
    DELTA,
    EPSILON,
    RATE,
    arrays,
    by_dataset,
    crash_before,
    fresh,
    interrupted,
    ledger_entries,
    of_kind,
    open_run,
    run,
    same_bits,
    sized,
)
from helpers.fake_grid import FakeGrid
from helpers.secure_runs import CLIENTS, ON
from lalora_app import server_app
from lalora_app.aggregation.class_means import head_of_class_sums
from lalora_app.client import class_sums
from lalora_app.models.backbone import build
from lalora_app.privacy.accounting import Release, calibrate, epsilon, second_epsilon
from lalora_app.private_step import step
from lalora_app.settings.errors import ConfigError
from lalora_app.wire.refusals import REFUSALS

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
MEANS = {"model.head": "class-means"}
SHARE = 0.3  # the default of privacy.head-share


def mean_head(uploads):
    return head_of_class_sums(
        {n: np.mean([up[n] for up in uploads], axis=0, dtype="f8").astype("f4") for n in uploads[0]}
    )


def assert_close(one, other, atol):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=atol)


def test_a_run_without_these_keys_names_no_phase_of_the_head(tiny):
    assert [row["phase"] for row in run(tiny(**open_run())).rows] == ["B", "A", "B"]


def test_class_means_take_the_first_round_and_the_methods_schedule_follows(tiny, rounds):
    done = run(tiny(**open_run() | MEANS | {"train.head-rounds": 1, "num-server-rounds": 5}))
    assert [row["phase"] for row in done.rows] == ["head", "head", "B", "A", "B"]
    assert [row["aggregated"] for row in done.rows] == [True] * 5
    first = done.grid.trained(1)
    assert all(not x.any() for x in of_kind(first[0].start, "head").values())  # zero until then
    uploads = [arrays(e.reply) for e in sorted(first, key=lambda e: e.partition)]
    assert {name for up in uploads for name in up} == set(of_kind(first[0].start, "head"))
    second = done.grid.trained(2)[0].start
    assert_close(of_kind(second, "head"), mean_head(uploads), 1e-6)
    third = done.grid.trained(3)[0].start
    for which in ("A", "B"):  # no factor has moved, on the server or on a client
        assert same_bits(of_kind(third, which), of_kind(first[0].start, which))
    assert not same_bits(of_kind(third, "head"), of_kind(second, "head"))  # the probe trains it
    assert [round_.t for round_ in rounds[::2]] == [2, 3, 4, 5]  # round 1 has no local step
    for exchange in done.grid.trained(2):
        assert set(arrays(exchange.reply)) == set(of_kind(second, "head"))


def test_a_head_at_zero_is_zero_and_nothing_else_differs(tiny):
    (_, plain), (_, zero) = (build(tiny(**{"model.head": head})) for head in ("auto", "zero"))
    assert plain.keys() == zero.keys()
    for name, array in plain.items():
        expected = array if ".lora_" in name else np.zeros_like(array)
        assert np.array_equal(zero[name], expected), name
    assert any(array.any() for array in of_kind(plain, "head").values())


def test_the_whole_run_costs_its_epsilon_and_no_less(tiny):
    done = run(tiny(**sized() | MEANS))
    books = by_dataset(ledger_entries())
    assert len(books) == 2
    noise = calibrate(SHARE * EPSILON, DELTA, sampling_rate=1.0, steps=1)
    for entries in books.values():
        releases = [entry.release for entry in entries]
        assert releases[0] == Release(1.0, noise, 1)
        assert epsilon(releases[:1], DELTA) <= SHARE * EPSILON
        assert [r.count for r in releases[1:]] == [2, 2]
        assert [r.sampling_rate for r in releases[1:]] == pytest.approx([RATE, RATE])
        assert len({r.noise_multiplier for r in releases[1:]}) == 1  # constant over the steps
        assert 0.98 * EPSILON <= epsilon(releases, DELTA) <= EPSILON
        assert second_epsilon(releases, DELTA) <= EPSILON
        # What is counted here is what the noise is planned with: without it, less noise is enough.
        alone = calibrate(EPSILON, DELTA, sampling_rate=releases[1].sampling_rate, steps=4)
        assert releases[1].noise_multiplier > 1.01 * alone
    assert done.rows[-1]["epsilon_max"] <= EPSILON + 0.01
    assert "0.3 of epsilon" in done.json("privacy.json")["class_sums"]


def test_the_release_is_on_the_ledger_before_its_noise_is_drawn(tiny, monkeypatch):
    counted, honest = [], step.add_noise

    def spy(*args, **options):
        counted.append(sum(entry.release.count for entry in ledger_entries()))
        return honest(*args, **options)

    monkeypatch.setattr(step, "add_noise", spy)
    run(tiny(**open_run() | MEANS))
    assert counted[:2] == [1, 2]  # of the two clients' one release each
    assert all(drawn < total for drawn, total in enumerate(counted))


@pytest.mark.parametrize("share", [SHARE, 0.8])  # two releases at 0.8 of epsilon would exceed it
def test_a_failed_first_attempt_is_repeated_counted_twice_and_paid_by_the_steps(share, tiny):
    def fault(attempt, partition, reply):
        return None if attempt == 1 and partition == 1 else reply

    done = run(tiny(**sized() | MEANS | {"privacy.head-share": share}), fault=fault)
    assert [(row["round"], row["phase"]) for row in done.rows] == [
        (1, "head"),
        (1, "head"),
        (2, "B"),
    ]
    for entries in by_dataset(ledger_entries()).values():
        rates = [entry.release.sampling_rate for entry in entries]
        assert rates == [1.0, 1.0, pytest.approx(RATE)]
        assert epsilon([entry.release for entry in entries], DELTA) <= EPSILON


def test_a_run_goes_on_after_its_class_means(tiny, tmp_path, monkeypatch):
    changes = MEANS | {"privacy.noise": "seeded", "privacy.epsilon": float("inf")}
    whole = run(fresh(tiny, tmp_path, monkeypatch, "whole", **changes))
    config = fresh(tiny, tmp_path, monkeypatch, "halves", **changes)
    _, later = interrupted(config, 2, before=crash_before(2))
    second = run(later)
    assert [row["phase"] for row in second.rows] == ["head", "B", "A"]
    assert same_bits(second.adapter, whole.adapter)
    for entries in by_dataset(ledger_entries()).values():
        assert [entry.release.sampling_rate == 1.0 for entry in entries] == [True, False, False]


def test_secure_aggregation_gives_the_head_of_the_plain_mean(tiny, monkeypatch):
    uploads, honest = [], class_sums.run_class_sums

    def spy(*args, **options):
        result = honest(*args, **options)
        uploads.append({name: x.copy() for name, x in of_kind(result, "head").items()})
        return result

    monkeypatch.setattr(class_sums, "run_class_sums", spy)
    done = run(tiny(**open_run(CLIENTS) | ON | MEANS | {"num-server-rounds": 2}), CLIENTS)
    assert len(uploads) == CLIENTS
    found = of_kind(done.grid.trained(2)[0].start, "head")
    # The tiny model's class means are almost equal, so the scale of the head enlarges roundings.
    assert_close(found, mean_head(uploads), 2e-3)


def test_a_site_whose_limit_is_too_small_for_the_steps_refuses_before_the_class_means(tiny):
    """The release alone would fit: the limit of the whole run counts from its first round."""
    nodes = [{}, {"max-epsilon": EPSILON / 2, "delta": DELTA}, {}]
    done = run(tiny(**sized(3) | MEANS), nodes)
    assert {tuple(row["dropped"]) for row in done.rows} == {(f"refused: {REFUSALS['budget']}",)}
    assert sorted(name.split()[-1] for name in by_dataset(ledger_entries())) == ["0/3", "2/3"]


def test_a_site_refuses_class_means_whose_later_steps_have_too_little_noise(tiny, tmp_path):
    """At this share the release itself has more noise than the policy asks for."""
    policy = tmp_path / "policy.toml"
    policy.write_text(f"max-epsilon = 9.0\ndelta = {DELTA}\nmin-noise-multiplier = 9.0\n", "utf-8")
    assert calibrate(SHARE * EPSILON, DELTA, sampling_rate=1.0, steps=1) > 9.0
    done = run(tiny(**sized(3) | MEANS), [{}, {"policy": str(policy)}, {}])
    assert {tuple(row["dropped"]) for row in done.rows} == {(f"refused: {REFUSALS['policy']}",)}
    assert sorted(name.split()[-1] for name in by_dataset(ledger_entries())) == ["0/3", "2/3"]


@pytest.mark.parametrize("head", ["zero", "class-means"])
def test_a_head_of_several_layers_is_refused_before_any_message(tiny, head, tmp_path):
    from transformers import BertConfig, BertModel

    from conftest import WORDS, save_tokenizer

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")  # a checkpoint without a pooler, which then trains whole
    run_config = tiny(**open_run() | {"model.head": head, "model.name": str(tmp_path / "bert")})
    grid = FakeGrid(run_config, 2)
    with pytest.raises(ConfigError, match=f'model.head="{head}" must be "auto".*pooler') as caught:
        server_app.run(grid, run_config)
    assert "\n" not in str(caught.value)
    assert grid.exchanges == []


METHODS_TO_RUN = ["la-lora", "flora", "fedsa-lora", "beamlora", "losa", "duallora", "deer"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS_TO_RUN)
def test_methods_of_every_kind_wait_for_the_head(tiny, method):
    keys = open_run(method=method) | MEANS | {"train.head-rounds": 1, "num-server-rounds": 4}
    done = run(tiny(**keys))
    assert [row["phase"] for row in done.rows[:2]] == ["head", "head"]
    assert all(row["aggregated"] for row in done.rows)
    third = done.grid.trained(3)[0]
    assert all(not x.any() for x in of_kind(third.start, "B").values())
