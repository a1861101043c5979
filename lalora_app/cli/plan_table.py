"""The lines that ``lalora plan`` prints."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lalora_app.privacy.planning import Choice, Given

if TYPE_CHECKING:
    from lalora_app.simulation.traffic import Traffic

_LEGEND = """\
epochs    examples of a client's steps, divided by its examples
z         noise multiplier of a client's steps, as the run calibrates it
own       noise over signal in one entry of the mean update, each client adding its own noise
shared    the same with privacy.noise-share="sum", which takes a round for each step
times     own, or shared if the run shares noise, divided by the smallest: compare choices by it
now       the config as it is, within the limits or not"""
_LONG = 1e4 * 3600  # seconds; longer durations are shown in hours
_COSTS = {
    "time": "hours:minutes:seconds of the rounds, without the start of the run",
    "MB": "megabytes of one client's tensors in all rounds, up and down",
}


def of_given(given: Given, sizes: Sequence[int]) -> list[str]:
    """Return the lines on clients, privacy and limits; ``sizes``: n of each client."""
    rows = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    limits = [f"at least {given.min_steps:,} steps"]
    if given.max_examples != float("inf"):
        limits.append(f"at most {given.max_examples:,.0f} examples per client")
    if given.max_seconds != float("inf"):
        limits.append(f"at most {_duration(given.max_seconds)}")
    whose = "of all, by one sampling rate" if given.one_rate else "of the smallest"
    return [
        f"clients   {given.clients}, {given.per_round} in a round, with {rows} examples each; "
        f"z is that {whose}",
        "n         a plan tells these numbers: show it only where they may be known",
        f"privacy   epsilon {given.epsilon:g} at delta {given.delta:g} over the whole run",
        f"limits    {', '.join(limits)}",
    ]


def _duration(seconds: float) -> str:
    if seconds >= _LONG:
        return f"{seconds / 3600:.0e} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _columns(
    given: Given, traffic: "Traffic | None", least: float
) -> dict[str, tuple[int, Callable[[Choice], str]]]:
    """Return title -> (width, text of a choice); costs that are not known have no column."""
    columns: dict[str, tuple[int, Callable[[Choice], str]]] = {
        "batch": (6, lambda c: f"{c.batch_size:.0f}"),
        "steps": (6, lambda c: str(c.steps)),
        "local": (5, lambda c: str(c.local_steps)),
        "rounds": (6, lambda c: str(given.rounds_before + c.rounds)),
        "epochs": (6, lambda c: f"{c.examples / given.examples:.3g}"),
        "z": (7, lambda c: f"{c.noise_multiplier:.4g}"),
        "own": (8, lambda c: f"{c.own_noise:.2e}"),
        "shared": (8, lambda c: f"{c.shared_noise:.2e}"),
        "times": (6, lambda c: _short(c.noise / least)),
    }
    if given.speed is not None:
        columns["time"] = (9, lambda c: _duration(c.seconds))
    if traffic is not None:
        columns["MB"] = (11, lambda c: _megabytes(traffic, c, given.rounds_before))
    return columns


def _megabytes(traffic: "Traffic", choice: Choice, before: int) -> str:
    """Return what one client sends and receives in all its rounds."""
    rounds = before + choice.releases // choice.local_steps
    up, down = (rounds * each / 1e6 for each in traffic.per_round(rounds))
    return f"{_short(up)}/{_short(down)}"


def table(
    given: Given,
    traffic: "Traffic | None",
    choices: Sequence[Choice],
    marks: Sequence[tuple[str, Choice]],
) -> Iterator[str]:
    """Yield the table of all choices and its legend.

    Args:
        given: what the plan started from.
        traffic: the bytes of messages; None: not known.
        choices: the lines of the table.
        marks: words, each with the choice beside which it stands.
    """
    columns = _columns(given, traffic, min(each.noise for each in choices))
    yield "".join(f" {title:>{width}}" for title, (width, _) in columns.items())
    for each in choices:
        words = ", ".join(word for word, marked in marks if marked == each)
        cells = "".join(f" {show(each):>{width}}" for width, show in columns.values())
        yield f"{cells}  {words}".rstrip()
    yield from _LEGEND.splitlines()
    yield from (f"{title:<10}{_COSTS[title]}" for title in columns if title in _COSTS)
