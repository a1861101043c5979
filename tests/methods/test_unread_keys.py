"""Keys that a method does not read: they change no bit of its result, and are named."""

import logging

import pytest

from conftest import defaults
from helpers.app_runs import open_run, run, same_bits
from lalora_app.methods.table import METHODS
from lalora_app.methods.unread_keys import DEFAULTS, unread_keys

OTHER = {
    "train.optimizer": "adamw",
    "train.momentum": 0.5,
    "train.lr-a": 0.3,
    "train.lr-b": 0.7,
    "rule.period": 2,
    "rule.fair-weight": 50.0,
    "rule.flat-radius": 0.5,
    "rule.lr-ratio": 5.0,
    "rule.lr-gate": 0.5,
    "rule.gate-temperature": 0.1,
    "rule.tasks": 1,
    "rule.sparsity": 0.6,
}
OWN_OPTIMIZER = ("doppler", "dp-fedadamw")


def named(config) -> set[str]:
    return {entry.split("=")[0] for entry in unread_keys(config)}


def unread_by(method, tiny) -> set[str]:
    """All keys that are named, asked one by one: some exclude each other."""
    asked = ({key: value} for key, value in OTHER.items())
    return set().union(*(named(tiny(method=method, **change)) for change in asked))


def test_the_defaults_are_those_of_the_app():
    assert {key: defaults()[key] for key in DEFAULTS} == DEFAULTS
    assert {k for k in defaults() if k.startswith("rule.")} == {
        k for k in DEFAULTS if k.startswith("rule.")
    }
    assert set(OTHER) == set(DEFAULTS)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_default_is_never_named(method, tiny):
    assert unread_keys(tiny(method=method)) == []


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


def result(tiny, tmp_path, name, method, changes):
    """The last state of a repeatable run of four rounds."""
    keys = {"num-server-rounds": 4, "privacy.noise": "seeded", "train.batch-size": 24}
    keys |= {"method": method, "evaluate-every": 4, "output": str(tmp_path / name)}
    config = tiny(**open_run(1) | {"min-clients": 1, "min-replies": 1} | DEFAULTS | keys | changes)
    state = run(config, 1).folder.latest()
    return state.adapter | {f"drift {name}": array for name, array in state.drift.items()}


@pytest.mark.wide
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("method", list(METHODS))
def test_keys_change_the_result_if_and_only_if_they_are_read(method, tiny, tmp_path, monkeypatch):
    def changed(name, keys):
        monkeypatch.setenv("LALORA_HOME", str(tmp_path / f"home-{name}"))
        return result(tiny, tmp_path, name, method, {key: OTHER[key] for key in keys})

    unread = unread_by(method, tiny)
    plain = changed("plain", ())
    if method in OWN_OPTIMIZER:  # momentum goes with SGD only
        assert same_bits(changed("momentum", {"train.momentum"}), plain)
        assert same_bits(changed("unread", unread - {"train.momentum"}), plain)
    else:
        assert same_bits(changed("unread", unread), plain)
    for key in sorted(OTHER.keys() - unread):
        assert not same_bits(changed(key, {key}), plain), key


@pytest.mark.usefixtures("no_waiting")
def test_a_run_warns_once_of_all_values_without_effect(tiny, caplog):
    changes = {"num-server-rounds": 1, "rule.period": 3, "train.optimizer": "sgd"}
    config = tiny(**open_run(method="ffa-lora") | changes)
    with caplog.at_level(logging.WARNING, "flwr"):
        run(config)
    (line,) = [r.getMessage() for r in caplog.records if "has no use of" in r.getMessage()]
    assert line == 'method="ffa-lora" has no use of train.lr-a=0.001, rule.period=3'
