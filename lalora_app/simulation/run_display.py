"""Show a run: a progress bar over the rounds on a terminal, one line per round elsewhere."""

import sys
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lalora_app.server.log_lines import START, RoundLine, parse_folder
from lalora_app.simulation.run_log import Kind, LogEvent, read_line

_BAR_WIDTH = 20  # characters; the whole line fits into a terminal of 80
_KEPT_LINES = 30  # of other programs, shown when a run fails without a reason


class _TimeLeft(ProgressColumn):
    """Count the server's estimate down between two rounds."""

    def render(self, task: Task) -> Text:
        """Return the estimate as minutes and seconds; nothing before the first round."""
        end = task.fields["end"]
        if end is None:
            return Text("")
        minutes, seconds = divmod(max(0, round(end - task.get_time())), 60)
        return Text(f"ETA {minutes}:{seconds:02d}")


class _RoundsBar:
    """The progress bar of one run after another."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[scores]}", markup=False),
            _TimeLeft(),
        )
        self._progress = Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._progress.add_task("starting", total=None, scores="", end=None)

    def start(self) -> None:
        """Show the bar, unless it is there already."""
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, progress: RoundLine) -> None:
        """Move the bar to the rounds that are done."""
        score = progress.scores.split("  ")[0]
        fields: dict[str, Any] = {
            "description": f"round {progress.done}/{progress.total}",
            "scores": f"{score}  epsilon <= {progress.epsilon:.2f}",
            "end": self._progress.get_time() + progress.seconds_left,
        }
        if progress.outcome == START or progress.done == progress.total:
            fields["end"] = None
        self._progress.update(self._task, completed=progress.done, total=progress.total, **fields)


class RunDisplay:
    """Prints the app's lines of a run's log and keeps those that explain a failure.

    Args:
        console: destination of the lines; its bar is drawn only on a terminal.
        verbose: whether every line is printed as it comes, those of Flower and Ray included.
    """

    def __init__(self, console: Console, *, verbose: bool = False):
        self._console = console
        self._verbose = verbose
        live = console.is_terminal and not console.is_dumb_terminal and not verbose
        self._bar = _RoundsBar(console) if live else None
        self._results: list[str] = []
        self._others: deque[str] = deque(maxlen=_KEPT_LINES)
        self.reason = ""
        self.folder = ""  # of the run's results, once the server has made it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        self._print_results()

    def print(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        self._console.out(text, highlight=False)
        self._console.file.flush()

    def print_all(self, lines: Iterable[str]) -> None:
        """Print lines, each above the bar if there is one."""
        for line in lines:
            self.print(line)

    def show(self, line: str) -> None:
        """Take one line of the run's log."""
        event = read_line(line)
        if event.kind is Kind.FAILURE:
            self.reason = event.text
        self.folder = parse_folder(event.text) or self.folder
        if self._verbose:
            self._console.file.write(line)
            self._console.file.flush()
        else:
            self._show_event(event)

    def other_lines(self) -> list[str]:
        """Return the last lines of Flower and Ray that were not printed."""
        return list(self._others)

    def _show_event(self, event: LogEvent) -> None:
        match event.kind:
            case Kind.OTHER:
                self._others.append(event.text)
            case Kind.RESULT:
                self._results.append(event.text)
            case Kind.NOTE:
                self._print_results()  # of the run before, in a comparison
                self.print(event.text)
            case Kind.WARNING | Kind.ERROR:
                self.print(f"{event.kind.name.lower()}: {event.text}")
            case Kind.ROUND:
                self._show_round(event)

    def _show_round(self, event: LogEvent) -> None:
        if self._bar is None:
            self.print(event.text)
        elif event.progress:
            self._bar.start()
            self._bar.update(event.progress)
            if event.progress.failed:
                self.print(event.text)

    def _print_results(self) -> None:
        for line in ["", *self._results] if self._results else []:
            self.print(line)
        self._results = []


def standard_display(*, verbose: bool) -> RunDisplay:
    """Return the display on standard output, without colours where that is no terminal."""
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, force_terminal=terminal, no_color=not terminal)
    return RunDisplay(console, verbose=verbose)
