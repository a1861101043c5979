"""Separate the app's own lines from the lines of Flower and Ray in the log of a run."""

import re
from dataclasses import dataclass
from enum import Enum, auto

from lalora_app.server.log_lines import FAILURE, PREFIX, RoundLine, parse_result

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours and cursor movements
# Flower's "LEVEL [time]:  message"; Ray may put "(actor pid=1)" before it.
_OURS = re.compile(
    rf"\b(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) *[\d :,-]*: +(?P<text>{PREFIX}[: ].*)"
)


class Kind(Enum):
    """The kinds of lines in a run's log."""

    ROUND = auto()
    RESULT = auto()
    NOTE = auto()
    WARNING = auto()
    ERROR = auto()
    FAILURE = auto()  # the reason why the whole run failed
    OTHER = auto()  # of Flower, Ray and other libraries


@dataclass(frozen=True)
class LogEvent:
    """One line of a run's log.

    Attributes:
        kind: origin and meaning of the line.
        text: message without colours, level and the app's prefix.
        progress: parsed progress; of a line of kind ROUND only.
    """

    kind: Kind
    text: str
    progress: RoundLine | None = None


def read_line(line: str) -> LogEvent:
    """Parse one line of ``flwr log --stream`` into an event."""
    plain = _ANSI.sub("", line).rstrip()
    ours = _OURS.search(plain)
    if ours is None:
        return LogEvent(Kind.OTHER, plain)
    if ours["text"].startswith(FAILURE):
        return LogEvent(Kind.FAILURE, ours["text"].removeprefix(FAILURE).strip())
    return _own_event(ours["level"], ours["text"].removeprefix(PREFIX).lstrip(": "))


def _own_event(level: str, text: str) -> LogEvent:
    """Return the event of a line of the app, by its level and its form."""
    if level in ("ERROR", "CRITICAL"):
        return LogEvent(Kind.ERROR, text)
    if level == "WARNING":
        return LogEvent(Kind.WARNING, text)
    if (result := parse_result(text)) is not None:
        return LogEvent(Kind.RESULT, result)
    progress = RoundLine.parse(text)
    return LogEvent(Kind.ROUND if progress else Kind.NOTE, text, progress)
