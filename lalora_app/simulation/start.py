"""Start a run or a comparison in simulation, show it, and tell its end by the exit code."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE
from lalora_app.simulation.flower_engine import run_in_flower
from lalora_app.simulation.launch import CLIENTS_PER_GPU, Launch, read_launch
from lalora_app.simulation.launch_checks import go_offline_without_hub, needs_hub
from lalora_app.simulation.local_engine import run_in_workers
from lalora_app.simulation.run_display import RunDisplay, standard_display

# Runs a launch, shows its log, and returns whether it completed, or the reason why not.
Engine = Callable[[Launch, RunDisplay], tuple[bool, str]]
ENGINES: dict[str, Engine] = {"local": run_in_workers, "flower": run_in_flower}


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for SIGINT and SIGTERM, even if they were ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {end: signal.signal(end, interrupt) for end in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def launch(
    app: Path,
    overrides: Sequence[str],
    *,
    engine: str = "local",
    nodes: int | None = None,
    workers: int = 0,
    clients_per_gpu: int = CLIENTS_PER_GPU,
    verbose: bool = False,
) -> int:
    """Run the app in simulation and return 0 only if the run completed.

    Args:
        app: folder with the app's pyproject.toml.
        overrides: ``-c`` options of ``flwr run``: key=value pairs and TOML files; the last wins.
        engine: "local", the project's own worker processes, or "flower", Flower's simulation.
        nodes: number of simulated clients; None: as many as the resumed run has, or 4.
        workers: number of worker processes of the engine "local"; 0: one per core, or per share of
            a GPU.
        clients_per_gpu: number of clients that train on one GPU at the same time.
        verbose: whether the lines of Flower and Ray are printed as well.

    Raises:
        ConfigError: for a run that cannot succeed, before any client is started.
        LayoutError: for a model that gives no per-example gradients, likewise.
        FlowerError: if Flower cannot start the run, or does not tell its end.
    """
    if workers and engine != "local":
        raise ConfigError(
            f"--workers {workers} must be left out with --engine {engine}, which has no workers"
        )
    read = read_launch(app, overrides, nodes)
    launched = replace(read, clients_per_gpu=clients_per_gpu, workers=workers)
    display = standard_display(verbose=verbose)
    try:
        with _interruptible(), display:
            display.print("checking data, model and privacy budget")
            _look_for_hub(launched, display)
            completed, details = ENGINES[engine](launched, display)
    except KeyboardInterrupt:
        display.print_all(_how_to_go_on(launched, display.folder, engine))
        raise
    if completed:
        return 0
    code = _failed(details, display)
    display.print_all(_how_to_go_on(launched, display.folder, engine))
    return code


def _look_for_hub(launch: Launch, display: RunDisplay) -> None:
    if needs_hub(launch) and go_offline_without_hub():
        display.print("warning: the model hub does not answer: only its local cache is used")


def _options(launch: Launch, engine: str) -> str:
    """Return the options of the command that are not part of a run's config."""
    share = launch.clients_per_gpu
    given = {
        "engine": "" if engine == "local" else engine,
        "workers": launch.workers,
        "clients-per-gpu": 0 if share == CLIENTS_PER_GPU else share,
    }
    return "".join(f" --{name} {value}" for name, value in given.items() if value)


def _how_to_go_on(launch: Launch, folder: str, engine: str) -> list[str]:
    """Return the lines that tell how an unfinished run goes on, if it can."""
    if launch.config.compare != NONE:
        return ["the same command continues the comparison; finished runs are kept"]
    if not folder or not list(Path(folder).glob("checkpoints/*.safetensors")):
        return []
    resume = shlex.quote(f'resume-from="{folder}"')
    command = f"lalora run {shlex.quote(str(launch.app))}{_options(launch, engine)} -c {resume}"
    return [f"to continue the run: {command}"]


def _failed(details: str, display: RunDisplay) -> int:
    """Print the reason of a failed run in one line, after Flower's lines if the app gave none."""
    if not display.reason:
        print("\n".join(display.other_lines()), file=sys.stderr)
    reason = display.reason or details or "it gives no reason; try --verbose"
    print(f"lalora: the run failed: {reason}", file=sys.stderr)
    return 1
