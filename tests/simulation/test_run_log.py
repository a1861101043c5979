"""The filter of a run's log, on recorded output of Flower and Ray."""

import pytest

from helpers.flower_log import ERROR, INFO, LOG, NOTES, RESULTS, ROUNDS, WARNING, WARNINGS
from lalora_app.server.log_lines import RoundLine
from lalora_app.simulation.run_log import Kind, read_line

EVENTS = [read_line(line) for line in LOG.splitlines()]


def texts(kind):
    return [event.text for event in EVENTS if event.kind is kind]


def test_the_app_s_lines_are_told_from_flower_s_and_ray_s():
    assert texts(Kind.ROUND) == ROUNDS
    assert texts(Kind.RESULT) == RESULTS
    assert texts(Kind.NOTE) == NOTES
    assert texts(Kind.WARNING) == WARNINGS
    assert texts(Kind.ERROR) == texts(Kind.FAILURE) == []
    assert len(texts(Kind.OTHER)) == len(EVENTS) - 12


def test_no_event_keeps_a_colour_or_flower_s_level():
    for event in EVENTS:
        assert "\x1b" not in event.text
        if event.kind is not Kind.OTHER:
            assert "INFO" not in event.text
            assert "LaLoRA" not in event.text


def test_a_round_carries_its_numbers():
    progress = [event.progress for event in EVENTS if event.progress]
    assert [(p.done, p.total, p.epsilon, p.seconds_left) for p in progress] == [
        (0, 2, 0.0, 0),
        (1, 2, 2.1, 21),
        (2, 2, 3.0, 0),
    ]
    assert isinstance(progress[0], RoundLine)


REASON = "privacy.epsilon=0.1 must be reachable"
LINES = {
    "failure": (f"{ERROR}LaLoRA: {REASON}", Kind.FAILURE, REASON),
    "failure without colours": (f"ERROR :     LaLoRA: {REASON}", Kind.FAILURE, REASON),
    "failure with a time": (
        f"ERROR 2026-11-26 20:16:03,123:     LaLoRA: {REASON}",
        Kind.FAILURE,
        REASON,
    ),
    "error of a comparison": (
        f"{ERROR}LaLoRA compare: a-eps1-seed0 failed: bad",
        Kind.ERROR,
        "compare: a-eps1-seed0 failed: bad",
    ),
    "a client's error through Ray": (
        f"\x1b[36m(ClientAppActor pid=123)\x1b[0m {ERROR}LaLoRA client: DataError: no rows",
        Kind.ERROR,
        "client: DataError: no rows",
    ),
    "a dropped reply": (
        f"{WARNING}LaLoRA round 3: a reply was dropped: stale",
        Kind.WARNING,
        "round 3: a reply was dropped: stale",
    ),
    "Flower's warning": (
        f"{WARNING}Since flwr 1.32, x",
        Kind.OTHER,
        "WARNING :   Since flwr 1.32, x",
    ),
    "a traceback": ("ConfigError: LaLoRA x", Kind.OTHER, "ConfigError: LaLoRA x"),
    "the app's name in Flower's line": (
        f"{INFO}Installed LaLoRA app",
        Kind.OTHER,
        "INFO :      Installed LaLoRA app",
    ),
    "nothing": ("\n", Kind.OTHER, ""),
}


@pytest.mark.parametrize("case", list(LINES))
def test_each_line_has_its_kind(case):
    line, kind, text = LINES[case]
    event = read_line(line + "\n")
    assert (event.kind, event.text) == (kind, text)
