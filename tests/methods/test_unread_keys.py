"""Keys that a method does not read: they change no bit of its result, and are named."""

import logging

import numpy as np
import pytest

from conftest import defaults
from helpers.app_runs import local_steps, open_run, run, same_bits
from lalora_app.adapter.factors import kind, select
from lalora_app.adapter.low_rank import add_to_drift
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.client import local_round
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.methods.table import METHODS
from lalora_app.methods.unread_keys import DEFAULTS, LORA_DEFAULTS, unread_keys
from lalora_app.models.backbone import build
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.step import RandomStreams
from lalora_app.server.initial_state import initial_state, pruned_state, pruning_step
from lalora_app.server_state.optimizer_step import server_step

OTHER = {
    "privacy.head-share": 0.5,
    "privacy.colluding": 1,
    "train.union-size": 9,
    "train.optimizer": "adamw",
    "train.momentum": 0.5,
    "train.lr-a": 0.3,
    "train.lr-b": 0.7,
    "train.lr-w": 0.2,
    "rule.period": 2,
    "rule.rank-decay": 0.5,
    "rule.tail-penalty": 0.5,
    "rule.fair-weight": 50.0,
    "rule.residual-rank": 1,
    "rule.flat-radius": 0.5,
    "rule.lr-ratio": 5.0,
    "rule.filter-order": 2,
    "rule.global-pull": 0.1,
    "rule.lr-gate": 0.5,
    "rule.gate-temperature": 0.1,
    "rule.tasks": 1,
    "rule.task-rank-decay": 0.5,
    "rule.merge-tolerance": 0.999,
    "rule.sparsity": 0.6,
    "rule.sparsity-steps": 2,
    "rule.sparsity-spread": 0.1,
    "server.momentum": 0.5,
}
# Without these values a key has no effect: it needs an earlier task, or more than one feature.
NEEDED = {
    "rule.merge-tolerance": {"rule.tasks": 3},
    "rule.sparsity-steps": {"rule.sparsity": 0.6},
    "rule.sparsity-spread": {"rule.sparsity": 0.6},
}
EXAMPLES = 12
ROUNDS = {"num-server-rounds": 4}
OWN_OPTIMIZER = ("doppler", "dp-fedadamw", "dp-fedadamw-full")


def named(config) -> set[str]:
    return {entry.split("=")[0] for entry in unread_keys(config)}


def unread_by(method, tiny) -> set[str]:
    """All keys that are named, asked one by one: some exclude each other."""
    asked = ({key: value} for key, value in OTHER.items())
    found = (named(tiny(method=method, **change)) for change in asked)
    return set().union(*found) & set(OTHER)  # the tiny run has its own rank


def test_the_defaults_are_those_of_the_app():
    known = DEFAULTS | LORA_DEFAULTS
    assert {key: defaults()[key] for key in known} == known
    assert {k for k in defaults() if k.startswith("rule.")} == {
        k for k in DEFAULTS if k.startswith("rule.")
    }
    assert set(OTHER) == set(DEFAULTS)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_default_is_never_named(method, tiny):
    assert unread_keys(tiny(method=method, **LORA_DEFAULTS)) == []


@pytest.mark.parametrize("method", list(METHODS))
def test_full_fine_tuning_alone_does_not_read_rank_scale_and_kernel(method, tiny):
    changes = {"lora.rank": 2, "lora.alpha": 3.0, "lora.kernel": "plain"}
    named = ["lora.rank=2", "lora.alpha=3.0", "lora.kernel='plain'"] if method == "full" else []
    assert unread_keys(tiny(method=method, **changes)) == named


@pytest.mark.parametrize(
    ("method", "key"),
    [
        *(("lora-plus", "train.lr-b"), ("doppler", "train.optimizer")),
        *(("dp-fedadamw", "train.optimizer"), ("doppler", "train.momentum")),
        *(("ffa-lora", "train.lr-a"), ("la-lora", "rule.period"), ("dp-lora", "rule.sparsity")),
    ],
)
def test_a_value_without_effect_is_named_with_its_key(method, key, tiny):
    assert unread_keys(tiny(method=method, **{key: OTHER[key]})) == [f"{key}={OTHER[key]!r}"]


@pytest.mark.parametrize(
    ("method", "key"),
    [
        *(("lora-plus", "rule.lr-ratio"), ("lora-plus", "train.lr-a"), ("fedsvd", "rule.period")),
        *(("dp-lora", "train.momentum"), ("ffa-lora", "train.lr-b"), ("losa", "rule.sparsity")),
    ],
)
def test_a_value_with_effect_is_not_named(method, key, tiny):
    assert unread_keys(tiny(method=method, **{key: OTHER[key]})) == []


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_reads_the_keys_of_the_step(method, tiny):
    changes = {"privacy.clipping": "automatic", "train.schedule": "cosine", "train.warm-up": 0.3}
    assert unread_keys(tiny(method=method, **changes | LORA_DEFAULTS)) == []


def test_the_share_of_class_means_is_read_with_them_only(tiny):
    changed = {"privacy.head-share": 0.5, "train.head-rounds": 1}
    assert unread_keys(tiny(**changed | ROUNDS)) == ["privacy.head-share=0.5"]
    assert unread_keys(tiny(**changed | ROUNDS | {"model.head": "class-means"})) == []


@pytest.fixture
def result(tiny):
    """The server's state after four rounds without noise, as flat tensors."""

    def after(method, changes):
        config = tiny(**DEFAULTS | {"num-server-rounds": 4, "method": method} | changes)
        model, start = build(config)
        encoded = model.encode(split(config.data)[1])
        data = EncodedTexts(encoded.tokens[:EXAMPLES], encoded.labels[:EXAMPLES], encoded.pad)
        results = {}
        for number, first in enumerate(starts(start, method)):
            state = initial_state(config, model, data, first)
            for t in range(1, 5):
                state = one_round(config, model, data, state, t)
            tensors = state.adapter | {f"drift {n}": array for n, array in state.drift.items()}
            results |= {f"{number} {name}": array for name, array in tensors.items()}
        return results

    return after


def starts(start, method):
    """The initial adapters to try: BeamLoRA prunes nothing while all of its gates are equal."""
    ramp = {n: 2 * np.arange(len(x), dtype="f4") for n, x in start.items() if kind(n) == "gate"}
    unequal = start | {name: start[name] + step for name, step in ramp.items()}
    return [start, unequal] if method == "beamlora" else [start]


def one_round(config, model, data, state, t):
    """The state after round ``t``, as the strategy computes it from two uploads.

    The second upload is the first with the entries of its factors and head moved on by one, but
    for the gates: a correction then has an effect, and a residual more than one direction.
    """
    method, rank = METHODS[config.method], config.lora.rank
    whole = local_round.run_round(
        model,
        data,
        state.adapter,
        state.drift,
        local=local_steps(config, t),
        reservation=Reservation(Release(1.0, 0.0, config.train.local_steps)),
        streams=RandomStreams(seeded(0, "sampling"), seeded(0, "noise")),
    )
    sent = method.sent(t, last=False)
    info = RoundInfo(t=t, rounds=4, seed=0, numbers=config.rule)
    upload = select(whole, sent)
    rotated = {n: x if kind(n) == "gate" else np.roll(x, 1) for n, x in upload.items()}
    uploads = [upload, rotated]
    weights = [1.0, 1.0]
    if config.server.changes_update:
        state, stepped = server_step(config.server, state, weights, uploads)
        weights, uploads = [1.0], [stepped]
    new = method.aggregate(state.adapter, weights, uploads, info)
    scale = config.lora.alpha / rank
    drift = add_to_drift(state.drift, new.fold, scale) if new.fold else None
    state = state.advanced(new.adapter, sent, drift)
    step = pruning_step(t, config) if method.calibrates else None
    return state if step is None else pruned_state(config, model, data, state, step)


@pytest.mark.wide
@pytest.mark.parametrize("method", list(METHODS))
def test_keys_change_the_result_if_and_only_if_they_are_read(method, tiny, result):
    def changed(keys):
        return result(method, {key: OTHER[key] for key in keys})

    unread, plain = unread_by(method, tiny), result(method, {})
    if method in OWN_OPTIMIZER:  # momentum goes with SGD only
        assert same_bits(changed({"train.momentum"}), plain)
        assert same_bits(changed(unread - {"train.momentum"}), plain)
    else:
        assert same_bits(changed(unread), plain)
    for key in sorted(OTHER.keys() - unread):
        needed = NEEDED.get(key, {})
        other = result(method, needed | {key: OTHER[key]})
        assert not same_bits(other, result(method, needed)), key


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "yogi"])
def test_the_servers_momentum_is_read_by_all_optimisers_but_sgd(optimizer, tiny, result):
    server = {"server.optimizer": optimizer, "server.lr": 0.1}
    other = server | {"server.momentum": 0.5}
    unread = optimizer == "sgd"
    assert named(tiny(method="dp-lora", **other)) == ({"server.momentum"} if unread else set())
    assert same_bits(result("dp-lora", other), result("dp-lora", server)) == unread


@pytest.mark.usefixtures("no_waiting")
def test_a_run_warns_once_of_all_values_without_effect(tiny, caplog):
    changes = {"num-server-rounds": 1, "rule.period": 3, "train.optimizer": "sgd"}
    config = tiny(**open_run(method="ffa-lora") | changes)
    with caplog.at_level(logging.WARNING, "flwr"):
        run(config)
    (line,) = [r.getMessage() for r in caplog.records if "does not read" in r.getMessage()]
    assert (
        line == 'LaLoRA this run of method="ffa-lora" does not read train.lr-a=0.001, '
        "train.lr-w=0.001, rule.period=3: "
        "the values have no effect"
    )
