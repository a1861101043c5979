"""Methods for which the server's optimiser or average makes no sense are refused, with a reason."""

from itertools import product

import numpy as np
import pytest

from conftest import make_config
from helpers.server_rules import at, drawn
from lalora_app.adapter.factors import kind, select
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.table import METHODS
from lalora_app.settings.errors import ConfigError

NOT_A_MEAN = {"flora", "flexlora", "hetlora", "lora-fair", "lora-fair-cosine", "fedex-lora"}
NOT_A_MEAN |= {"dp-fedadamw-full"}
NEW_COORDINATES = {"rac-lora", "fedsvd", "deer", "galore-dwa", "beamlora", "sd-lora", "duallora"}
NEW_COORDINATES |= {"rac-lora-a"}
MOVES_BASE = {"flora", "fedex-lora", "rac-lora", "rac-lora-a", "galore-dwa"}
MORE_TENSORS = {"beamlora", "sd-lora", "duallora", "losa"}
LAST_ROUND = {"fedsa-lora"}
STEPS = {"server.optimizer": "momentum", "server.lr": 0.5}
AVERAGES = ("ema:0.9", "tail:0.5")


def reason(names: dict[str, set[str]], method: str) -> str | None:
    return next((words for words, refused in names.items() if method in refused), None)


def assert_refused(method: str, key: str, value, plain: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method_of(make_config(method=method, **{key: value}))
    shown = f'"{value}"' if isinstance(value, str) else value
    assert str(caught.value).startswith(f"{key}={shown} must be {plain} for method {method}, ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "key"), product(METHODS, STEPS))
def test_the_servers_step_needs_a_mean_in_fixed_coordinates(method, key):
    names = {"not a mean": NOT_A_MEAN, "coordinates": NEW_COORDINATES, "last round": LAST_ROUND}
    words, plain = reason(names, method), '"sgd"' if key == "server.optimizer" else "1.0"
    if words is None:
        assert method_of(make_config(method=method, **{key: STEPS[key]})) is METHODS[method]
    else:
        assert_refused(method, key, STEPS[key], plain, words)


@pytest.mark.parametrize(("method", "average"), product(METHODS, AVERAGES))
def test_an_average_needs_products_of_a_and_b_on_a_fixed_base(method, average):
    names = {"more tensors": MORE_TENSORS, "frozen weights": MOVES_BASE, "last round": LAST_ROUND}
    if words := reason(names, method):
        assert_refused(method, "server.average", average, '"none"', words)
    else:
        method_of(make_config(method=method, **{"server.average": average}))


def midway(method: str):
    """An adapter of the method in the middle of a run, with gates that differ."""
    rng = np.random.default_rng(0)
    start = METHODS[method].start(drawn(rng, rank=4), at().numbers)
    ramp = {n: 2 * np.arange(len(x), dtype="f4") for n, x in start.items() if kind(n) == "gate"}
    return start | ramp


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.linear])
def test_a_rule_keeps_its_coordinates_if_and_only_if_its_entry_says_so(method):
    """Clients that change nothing: the rule then changes nothing either, or the coordinates."""
    entry, adapter = METHODS[method], midway(method)
    unchanged = True
    for t in range(1, 10):
        upload = select(adapter, entry.sent(t, last=t == 9))
        new = entry.aggregate(adapter, [1.0, 2.0], [upload, upload], at(t))
        same = all(np.array_equal(new.adapter[n], x) for n, x in adapter.items())
        unchanged = unchanged and same and not new.fold
    assert unchanged == entry.averages_tensors


def test_the_servers_step_goes_with_secure_aggregation_and_with_a_robust_mean():
    changes = {"method": "la-lora", "min-replies": 2, **STEPS, "server.average": "ema:0.9"}
    method_of(make_config(**changes, **{"secure-aggregation": "secagg+"}))
    method_of(make_config(**changes, robust="median"))
