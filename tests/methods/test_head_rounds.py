"""A method behind its rounds of the head alone: its own rounds are the same, only later."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import make_config
from lalora_app.adapter.factors import AB, NONE, A, B, active_names
from lalora_app.aggregation.rule import Aggregated, RoundInfo
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.head_rounds import after_head_rounds
from lalora_app.methods.table import METHODS

HEAD, FACTOR = "base_model.model.classifier.weight", "x.lora_A.weight"


def delayed(name="la-lora", **changes):
    return method_of(make_config(method=name, **changes))


def test_without_such_rounds_a_method_is_its_entry_of_the_table():
    for name, entry in METHODS.items():
        assert delayed(name) is entry


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize(("changes", "first"), [(1, 2), (2, 3)])
def test_the_methods_round_one_comes_after_them(name, changes, first):
    method = delayed(name, **{"model.head": "class-means", "train.head-rounds": changes})
    entry = METHODS[name]
    for t in range(1, first + 1):
        assert method.sent(t, last=True) == method.sent(t, last=False) == NONE
        assert method.resident(t, 4) == NONE
        assert all(method.trains(t, k) == NONE for k in range(4))
    for t in range(1, 5):
        assert method.syncs(first + t) == entry.syncs(t)
        assert method.sent(first + t, last=True) == entry.sent(t, last=True)
        assert method.resident(first + t, 4) == entry.resident(t, 4)
        assert [method.trains(first + t, k) for k in range(4)] == [
            entry.trains(t, k) for k in range(4)
        ]


def test_the_servers_rule_waits_and_counts_its_own_rounds():
    seen = []

    def rule(current, weights, uploads, info):
        seen.append((info.t, info.rounds, info.seed))
        return Aggregated(current)

    config = make_config(**{"train.head-rounds": 2})
    method = after_head_rounds(replace(METHODS["flora"], aggregate=rule), config)
    start = {HEAD: np.zeros((2, 3), "f4"), FACTOR: np.ones((1, 3), "f4")}
    upload = {HEAD: np.ones((2, 3), "f4")}
    for t in range(1, 5):
        info = RoundInfo(t=t, rounds=10, seed=7, numbers=config.rule)
        new = method.aggregate(start, [1.0], [upload], info)
        assert (new.adapter[HEAD].mean() == 1.0) == (t <= 2)  # the plain mean of the heads
        assert new.adapter[FACTOR] is start[FACTOR]
    assert seen == [(1, 8, 7), (2, 8, 7)]


def test_gates_rest_with_their_factors():
    names = [HEAD, "x.lora_A.weight", "x.lora_B.weight", "x.lora_gate.weight", "x.lora_fixed.w"]
    assert active_names(names, NONE) == {HEAD}
    assert active_names(names, A) == {HEAD, "x.lora_A.weight", "x.lora_gate.weight"}
    assert len(active_names(names, AB)) == len(active_names(names, B)) + 1 == 4
