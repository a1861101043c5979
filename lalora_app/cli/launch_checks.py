"""The checks of a run before Flower starts, in processes of their own.

torch and a model take hundreds of megabytes, which the launching process would otherwise keep for
the whole run.
"""

import contextlib
import json
import os
import pickle
import selectors
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, TIMM, full_path, is_local
from lalora_app.settings.run_config import Config

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments
_DEMO = "demo:"  # prefix of the bundled data and model
_HUB = "https://huggingface.co"
_HUB_SECONDS = 5.0


class ProcessEndedError(Exception):
    """The process ended without a result, for example for want of memory."""


@dataclass(frozen=True)
class Launch:
    """A run, or a comparison, as it will be started.

    Attributes:
        config: its parsed config.
        defaults: the app's flat config, for the plan of a comparison.
        nodes: the number of simulated clients.
    """

    config: Config
    defaults: dict[str, Any]
    nodes: int


def answer_call() -> None:
    """Call the function on standard input; write (True, result) or (False, error) to the output.

    The main function of the process that :func:`call_in_own_processes` starts.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    function, args = pickle.load(sys.stdin.buffer)
    try:
        answer = True, function(*args)
    except Exception as error:  # of any kind; the launcher raises it again
        error.add_note(traceback.format_exc())
        answer = False, error
    pickle.dump(answer, output)
    output.close()


def _start(call: Call) -> subprocess.Popen[bytes]:
    """Start a process that calls a function."""
    code = f"from {__name__} import answer_call; answer_call()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # warnings of libraries; errors are part of the answer
        start_new_session=True,  # Ctrl-C is for the launcher, which ends this process
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # _result tells a dead one
        pickle.dump(call, pipe)
    return process


def _result(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        returned, value = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise ProcessEndedError(
            "a process that checks the run was ended from outside, perhaps for want of memory"
        ) from error
    if not returned:
        raise value
    return value


def _results(running: list[subprocess.Popen[bytes]]) -> list[Any]:
    """Return the results in the order of the processes; an error is raised when it arrives."""
    found: dict[int, Any] = {}
    with selectors.DefaultSelector() as selector:
        for index, process in enumerate(running):
            selector.register(cast(IO[bytes], process.stdout), selectors.EVENT_READ, index)
        while len(found) < len(running):
            key, _ = selector.select()[0]
            found[key.data] = _result(running[key.data])
            selector.unregister(key.fileobj)
    return [found[index] for index in range(len(running))]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def call_in_own_processes(*calls: Call) -> list[Any]:
    """Return the result of each call, computed in new processes at the same time.

    Args:
        calls: pairs of a function of a module and its arguments; arguments, results and errors can
            be pickled.

    Raises:
        ProcessEndedError: if a process was ended from outside.
        Exception: the error of the call that fails first; the others are ended.
    """
    running: list[subprocess.Popen[bytes]] = []
    try:
        running.extend(map(_start, calls))
        return _results(running)
    finally:
        for process in running:
            _end(process)


def needs_hub(launch: Launch) -> bool:
    """Return whether a run, or one run of a comparison, fetches a model or data from the hub."""
    return any(_fetches(config) for _, config, _ in _configs(launch))


def _fetches(config: Config) -> bool:
    """Return whether the name of model or data is an id of the hub."""
    model = config.model.name.removeprefix(TIMM)
    timm_code = model != config.model.name and config.model.weights == "random"
    return not (
        (timm_code or model.startswith(_DEMO) or is_local(model))
        and (config.data.name.startswith(_DEMO) or is_local(config.data.name))
    )


def _is_reachable(address: str) -> bool:
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:  # an answer, of any kind
        return True
    except (OSError, ValueError):
        return False
    return True


def go_offline_without_hub() -> bool:
    """Let the hub's client use its local cache only, if the hub does not answer within seconds.

    Otherwise the client tries each file again and again, for more than a minute.

    Returns:
        Whether the hub does not answer.
    """
    if "HF_HUB_OFFLINE" in os.environ or _is_reachable(os.environ.get("HF_ENDPOINT", _HUB)):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True


def _needs(config: Config) -> Config:
    """Return a config without the keys that :func:`check_run` does not depend on."""
    train = replace(config.train, lr_a=1.0, lr_b=1.0, lr_head=1.0)
    return replace(config, method="", seed=0, output="", train=train)


def _configs(launch: Launch) -> Iterable[tuple[str, Config, int]]:
    """Yield name, config and number of clients of a run, or of a comparison's unfinished runs.

    Of several runs with the same needs, only the first.
    """
    if launch.config.compare == NONE:
        yield "", launch.config, launch.nodes
        return
    from lalora_app.comparison.finished_cells import find_finished
    from lalora_app.comparison.plan import parse_cell
    from lalora_app.comparison.plan_file import read_plan

    file = full_path(launch.config.compare)
    plan = read_plan(json.loads(file.read_text("utf-8")), launch.defaults)
    seen = set()
    for cell in [*plan.tuning_cells(), *plan.cells({})]:
        config = parse_cell(cell)
        if _needs(config) not in seen and find_finished(file.parent, cell) is None:
            seen.add(_needs(config))
            yield f"{cell.folder}: ", config, plan.nodes


def _check(launch: Launch, part: str) -> None:
    """Check one part of all runs, by a function of ``server/before_start.py``."""
    from lalora_app.server import before_start

    for name, config, nodes in _configs(launch):
        try:
            getattr(before_start, part)(config, nodes)
        except ConfigError as error:
            raise ConfigError(f"{name}{error}") from None


def check_launch(launch: Launch) -> None:
    """Check data, clients, ε and model of a run, or of each run of a comparison.

    Data and model are checked at the same time: each takes seconds, most of them for imports.

    Raises:
        ConfigError: naming the key, its value and the law, for the first failed check.
        LayoutError: if a model gives no per-example gradients.
        ProcessEndedError: if a check was ended from outside.
    """
    from lalora_app.server.before_start import check_clients

    if launch.config.compare == NONE:
        check_clients(launch.config, launch.nodes)  # at once: it needs no data and no model
    parts = ("check_data", "check_model")
    call_in_own_processes(*((_check, (launch, part)) for part in parts))


def resumed_config(own: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Return the flat config and the number of clients of the run in ``resume-from``.

    Args:
        own: the keys that the command gives.

    Raises:
        ConfigError: if the folder holds no run, or the command gives a key another value.
    """
    from lalora_app.results.run_folder import RunFolder, read_config
    from lalora_app.settings.run_config import flatten

    folder = full_path(str(own["resume-from"]))
    if not (folder / "config.toml").is_file():
        raise ConfigError(f'resume-from="{own["resume-from"]}" must be the folder of a run')
    saved = flatten(read_config(folder))
    for key, value in own.items():
        if key in saved and key not in ("resume-from", "output", "compare") and saved[key] != value:
            raise ConfigError(f"{key}={value!r} must be {saved[key]!r}, as in resume-from")
    return saved, RunFolder(Path(folder)).num_clients()
