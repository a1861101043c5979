"""Lines of the server's log: one definition for the server that writes and the command that reads.

Every line of the app starts with :data:`PREFIX`; Flower and Ray write to the same log.
"""

import re
from dataclasses import dataclass
from typing import Self

PREFIX = "LaLoRA"
FAILURE = "LaLoRA: "  # before the reason why the whole run failed
START, AGGREGATED, TOO_FEW = "start", "aggregated", "FAILED: too few valid replies"

_RESULT = "result"
_FOLDER = "the results go to "
_LABEL_WIDTH = 9
_ROUND = re.compile(
    r"round (?P<done>\d+)/(?P<total>\d+)  (?P<outcome>start|phase \S+  [^ ]+(?: [^ ]+)*)"
    r"  (?P<scores>.+)  epsilon <= (?P<epsilon>\S+)"
    r"(?:  (?P<seconds>\S+) s  ETA (?P<minutes>\d+):(?P<rest>\d\d))?"
)


@dataclass(frozen=True)
class RoundLine:
    """The progress of a run after one round, or before the first.

    Attributes:
        done: rounds attempted so far.
        total: rounds of the run.
        outcome: :data:`START` before the first round of a session, else phase and success.
        scores: scores on the test split as text.
        epsilon: largest ε that any client can have spent.
        seconds: duration of the round; not printed at the start.
        seconds_left: estimated time until the end of the run; not printed at the start.
    """

    done: int
    total: int
    outcome: str
    scores: str
    epsilon: float
    seconds: float = 0.0
    seconds_left: int = 0

    @property
    def failed(self) -> bool:
        """Whether the round had too few valid replies."""
        return self.outcome.endswith(TOO_FEW)

    def text(self) -> str:
        """Return the line without the prefix."""
        head = f"round {self.done}/{self.total}  {self.outcome}  {self.scores}"
        line = f"{head}  epsilon <= {self.epsilon:.2f}"
        if self.outcome == START:
            return line
        minutes, rest = divmod(self.seconds_left, 60)
        return f"{line}  {self.seconds:.1f} s  ETA {minutes}:{rest:02d}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a round's line without the prefix; return None for any other line."""
        found = _ROUND.fullmatch(text)
        if found is None:
            return None
        return cls(
            done=int(found["done"]),
            total=int(found["total"]),
            outcome=found["outcome"],
            scores=found["scores"],
            epsilon=float(found["epsilon"]),
            seconds=float(found["seconds"] or 0),
            seconds_left=60 * int(found["minutes"] or 0) + int(found["rest"] or 0),
        )


def folder_text(folder: object) -> str:
    """Return the log line, without the prefix, that names the folder of a run's results."""
    return f"{_FOLDER}{folder}"


def parse_folder(text: str) -> str:
    """Parse a log line that names the folder of a run; return "" for any other line."""
    return text.removeprefix(_FOLDER) if text.startswith(_FOLDER) else ""


def result_text(label: str, value: str) -> str:
    """Return the log line, without the prefix, of one line of the results."""
    return f"{_RESULT}  {label:<{_LABEL_WIDTH}}{value}"


def parse_result(text: str) -> str | None:
    """Parse a log line with a result, its label aligned; return None for any other line."""
    kind, gap, result = text.partition("  ")
    return result if gap and kind == _RESULT else None
