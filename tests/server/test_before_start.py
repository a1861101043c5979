"""Checks before Flower starts: every kind of refusal leaves no file, ledger line or process."""

import math
from pathlib import Path

import pytest

from lalora_app.privacy.accounting import calibrate, smallest_epsilon
from lalora_app.privacy.ledger import state_folder
from lalora_app.server.before_start import check_clients, check_data, check_epsilon, check_model
from lalora_app.settings.errors import ConfigError

REFUSED = {
    "too few clients": ({"min-clients": 3}, r"^min-clients=3 must be at most .* --nodes 2"),
    "too few replies": (
        {"fraction-train": 0.5, "min-replies": 2},
        r"^min-replies=2 must be at most 1, .* fraction-train=0\.5",
    ),
    "a batch above a client": ({"train.batch-size": 500}, r"^train\.batch-size=500"),
    "delta above 1/n": ({"privacy.delta": 0.5}, r"^privacy\.delta=0\.5"),
    "a column": ({"data.input-column": "x"}, r'^data\.input-column="x" must be a column'),
    "a missing file": ({"data.name": "/no/such.csv"}, r'^data\.name="/no/such\.csv"'),
    "too small an epsilon": (
        {"privacy.epsilon": 0.001},
        r"^privacy\.epsilon=0\.001 must be at least 0\.00\d+, the smallest possible for \d+ steps",
    ),
    "too small a share of epsilon": (
        {"model.head": "class-means", "privacy.epsilon": 0.3, "privacy.head-share": 0.001},
        r"^privacy\.head-share=0\.001 must be at least 0\.0\d+, the smallest share for one release",
    ),
    "an unknown method": ({"method": "la-lara"}, r'^method="la-lara" .* did you mean "la-lora"\?'),
    "too few steps": (
        {"method": "la-lora-full", "train.local-steps": 1},
        r"^train\.local-steps=1 must be at least 2",
    ),
    "no such device": (
        {"model.device": "cuda:63"},
        r'^model\.device="cuda:63" must be one of auto',
    ),
    "no such target": ({"lora.targets": "nothing"}, r'^lora\.targets="nothing" must name'),
    "one of two targets": (
        {"lora.targets": "query,valeu"},
        r'^lora\.targets="query,valeu" must name .*, and "valeu" names none$',
    ),
    "auto among targets": ({"lora.targets": "auto,query"}, r'and "auto" names none$'),
    "too large a rank": ({"lora.rank": 999}, r"^lora\.rank=999 must be at most"),
    "too long a text": ({"model.max-length": 10_000}, r"^model\.max-length=10000 must be at most"),
    "a missing model": ({"model.name": "/no/model"}, r'^model\.name="/no/model" must be a folder'),
    "a results folder": ({"output": "/proc/x"}, r'^output="/proc/x" must be writable'),
}


def check(config):
    check_data(config, 2)
    check_model(config, 2)


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_run_is_refused_and_leaves_nothing(case, tiny):
    changes, words = REFUSED[case]
    config = tiny(**{"min-clients": 2, "min-replies": 2} | changes)
    with pytest.raises(ConfigError, match=words) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.output).exists()
    assert not (state_folder({}) / "ledger.sqlite").exists()


def test_more_clients_than_examples_are_refused(tiny):
    config = tiny(**{"data.partitioner": "iid", "train.batch-size": 1})
    with pytest.raises(
        ConfigError, match=r'^data\.partitioner="iid" must deal .* for 500 clients$'
    ):
        check_data(config, 500)


def test_a_run_that_can_start_leaves_nothing_either(tiny):
    config = tiny(**{"min-clients": 2, "min-replies": 2})
    found = check_data(config, 2)
    check_model(config, 2)
    assert sum(found.sizes) == len(found.train)
    assert len(found.sizes) == 2
    assert not Path(config.output).exists()
    assert not (state_folder({}) / "ledger.sqlite").exists()


def test_as_many_clients_as_asked_for_are_enough(tiny):
    check_clients(tiny(**{"min-clients": 3, "min-replies": 3}), 3)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_smallest_epsilon_is_that_of_the_client_with_the_largest_rate_and_most_rounds(
    tiny, fraction
):
    keys = {"fraction-train": fraction, "num-server-rounds": 4, "train.local-steps": 3}
    config = tiny(**keys | {"train.batch-size": 8, "privacy.delta": 1e-5, "privacy.epsilon": 1e-6})
    with pytest.raises(ConfigError) as caught:
        check_epsilon(config, [[200], [80]])
    steps = round(12 * fraction)
    smallest = smallest_epsilon(1e-5, sampling_rate=0.1, steps=steps)
    told = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert 0 <= told - smallest <= 1e-4
    assert f"for {steps} steps with sampling rate 0.1 " in str(caught.value)
    # The told value is possible for the calibration of the run itself, and less is not.
    assert calibrate(told, 1e-5, sampling_rate=0.1, steps=steps) > 0
    with pytest.raises(ValueError, match="leaves too little"):
        calibrate(smallest * 0.99, 1e-5, sampling_rate=0.1, steps=steps)


def test_without_a_budget_there_is_no_smallest_epsilon(tiny):
    check_epsilon(tiny(**{"privacy.epsilon": math.inf}), [[1]])
