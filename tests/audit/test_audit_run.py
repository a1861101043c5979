"""The end-to-end audit: it finds canaries where nothing hides them, and loses them in the noise."""

import math

import numpy as np
import pytest
import torch

import helpers.shared_accounting  # noqa: F401
from conftest import WORDS, save_tokenizer
from lalora_app.audit.draw_estimates import posterior_counts, standardised
from lalora_app.audit.planted_federation import Federation, mislabelled
from lalora_app.audit.run_attack import auc, audit_run
from lalora_app.settings.errors import ConfigError

FIRST, SECOND = [(1, "A"), (1, "B"), (1, "head")], [(2, "A"), (2, "B"), (2, "head")]


@pytest.fixture(scope="session")
def vivid_model(tmp_path_factory) -> str:
    """Folder of a 2-layer BERT whose random weights are so large that texts look different."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("vivid-bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(WORDS),
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.3,
        **sizes,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def vivid(tiny, vivid_model):
    """Config of a run with more entries in a factor than records at a client."""

    def build(**changes):
        base = {
            **{"model.name": vivid_model, "model.pooling": "mean", "lora.rank": 16},
            **{"lora.alpha": 16.0, "num-server-rounds": 3, "train.batch-size": 32},
        }
        return tiny(**base | changes)

    return build


def audited_run(config, seed=0):
    return audit_run(config, canaries=40, clients=2, seed=seed, confidence=0.95)


def test_without_noise_the_attack_finds_nearly_all_that_was_drawn(vivid):
    found = audited_run(vivid(**{"privacy.epsilon": math.inf}))
    parts = {(part.t, part.kind): part for part in found.parts}
    assert found.aucs["sent"] > 0.75
    assert found.aucs["sent"] > found.aucs["ceiling"] - 0.05
    assert parts[1, "B"].auc_drawn == parts[2, "B"].auc_drawn == 1.0
    assert parts[1, "A"].auc_drawn > 0.9  # B is zero at the start, and no more on the way
    assert found.epsilon > 0.3
    assert found.ledger == math.inf


def test_with_noise_the_same_attack_is_near_a_guess_and_proves_less_than_the_ledger(vivid):
    found = audited_run(vivid(**{"privacy.epsilon": 3.0}))
    assert 2.9 < found.ledger <= 3
    assert 0 <= found.epsilon <= found.ledger
    assert abs(found.aucs["sent"] - 0.5) < 0.2
    assert found.aucs["ceiling"] > 0.75
    sent = [(part.t, part.kind) for part in found.parts if part.sent and part.t < 3]
    assert sorted(sent) == [(1, "B"), (1, "head"), (2, "A"), (2, "head")]
    assert sorted((p.t, p.kind) for p in found.parts if p.t < 3) == FIRST + SECOND


def test_a_change_is_made_of_the_steps_since_the_server_has_seen_it(tiny, tmp_path):
    config = tiny(**{"privacy.epsilon": math.inf, "num-server-rounds": 3})
    examples = mislabelled(config, 10)
    members = np.arange(10) % 2 == 0
    federation = Federation(config, examples, members, 2, 0, tmp_path)
    rounds = list(federation.rounds())
    assert [seen.steps for seen in rounds] == [
        {"A": [1], "B": [0], "head": [0, 1]},
        {"A": [1, 3], "B": [2], "head": [2, 3]},
        {"A": [5], "B": [2, 4], "head": [4, 5]},
    ]
    own = len(federation.victim.data) - 10
    drawn = federation.drawn(range(6))
    assert drawn
    assert not drawn & {own + i for i in range(1, 10, 2)}


def records(seed=0):
    """Gradients that resemble each other, and how often each was drawn."""
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=400) + 0.3 * rng.normal(size=(60, 400))).astype(np.float32)
    return rows, (rng.random(60) < 0.2).astype(np.float32), rng


def test_counts_are_had_back_from_a_plain_sum_and_are_lost_in_noise():
    rows, counts, rng = records()
    found, shows = posterior_counts(rows, counts @ rows, prior=0.2, noise=0.0)
    np.testing.assert_allclose(found, counts, atol=0.1)
    assert shows.min() > 0.8
    x, spread = standardised(found, shows, 0.2)
    assert np.abs(x[counts == 1] - 1).max() < 0.2
    assert spread.max() < 0.3
    scores = []
    for _ in range(20):
        noised = counts @ rows + rng.normal(0, 100, 400).astype(np.float32)
        found, shows = posterior_counts(rows, noised, prior=0.2, noise=100.0**2)
        x, spread = standardised(found, shows, 0.2)
        scores.append(auc(x, counts > 0))
        assert spread.min() > 3
    assert abs(np.mean(scores) - 0.5) < 0.1


def test_the_spread_is_that_of_an_estimate_under_its_own_model():
    errors, spreads = [], []
    for seed in range(30):
        rows, counts, rng = records(seed)
        noised = counts @ rows + rng.normal(0, 3, 400).astype(np.float32)
        found, shows = posterior_counts(rows, noised, prior=0.2, noise=3.0**2)
        x = (found - 0.2) / shows
        errors.append(x[counts == 0] - np.median(x))
        spreads.append(standardised(found, shows, 0.2)[1][counts == 0])
    assert np.concatenate(errors).std() == pytest.approx(np.concatenate(spreads).mean(), rel=0.25)


def test_gradients_of_zero_show_nothing():
    found, shows = posterior_counts(np.zeros((6, 9), np.float32), np.zeros(9), prior=0.2, noise=0.0)
    assert not shows.any()
    x, spread = standardised(found, shows, 0.2)
    assert not x.any()
    assert spread.min() > 100


def test_only_plain_sgd_is_attacked(tiny):
    with pytest.raises(ConfigError, match=r'train.optimizer="adamw".* must be plain SGD'):
        audited_run(tiny(**{"train.optimizer": "adamw"}))
    with pytest.raises(ConfigError, match=r"method doppler must be plain SGD"):
        audited_run(tiny(method="doppler"))


def test_a_run_whose_ranks_shrink_is_not_attacked(tiny):
    with pytest.raises(ConfigError, match=r"rule.rank-decay=0.99 must be 1 for the audit"):
        audited_run(tiny(method="hetlora", **{"rule.rank-decay": 0.99}))


def test_a_run_with_random_views_is_not_attacked(images):
    with pytest.raises(ConfigError, match=r"train.views=2 must be 1 for the audit of a whole run"):
        audited_run(images("vit", **{"train.views": 2}))


def test_auc_is_the_chance_that_a_member_scores_higher():
    members = np.array([True, True, False, False])
    assert auc(np.array([3.0, 1.0, 2.0, 0.0]), members) == 0.75
    assert auc(np.zeros(4), members) == 0.5
    assert auc(np.arange(4), np.ones(4, bool)) == 0.5
