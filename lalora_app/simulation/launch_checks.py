"""The checks of a simulated run before it starts: data, clients, ε, model, and the hub."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import replace

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, TIMM, full_path, is_local
from lalora_app.settings.run_config import Config
from lalora_app.simulation.launch import Launch
from lalora_app.simulation.own_processes import call_in_own_processes

_DEMO = "demo:"  # prefix of the bundled data and model
_HUB = "https://huggingface.co"
_HUB_SECONDS = 5.0
_PARTS = ("check_data", "check_model")  # functions of server/before_start.py, the cheap one first


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
    """Return a config without the keys that :func:`check_launch` does not depend on."""
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
            yield f"{cell.folder}: ", config, 1 if config.central else plan.nodes


def _check(launch: Launch, part: str) -> None:
    """Check one part of all runs, by a function of ``server/before_start.py``."""
    from lalora_app.server import before_start

    for name, config, nodes in _configs(launch):
        try:
            getattr(before_start, part)(config, nodes)
        except ConfigError as error:
            raise ConfigError(f"{name}{error}") from None


def _check_at_once(launch: Launch) -> None:
    """Check what needs neither data nor model."""
    from lalora_app.server.before_start import check_clients

    if launch.config.compare == NONE:
        check_clients(launch.config, launch.nodes)


def check_here(launch: Launch) -> None:
    """Check a launch as :func:`check_launch` does, in this process and one part after the other."""
    _check_at_once(launch)
    for part in _PARTS:
        _check(launch, part)


def check_launch(launch: Launch) -> None:
    """Check data, clients, ε and model of a run, or of each run of a comparison.

    Data and model are checked at the same time: each takes seconds, most of them for imports. Each
    has its own process: torch and a model take hundreds of megabytes, which this process would
    otherwise keep for the whole run.

    Raises:
        ConfigError: naming the key, its value and the law, for the first failed check.
        LayoutError: if a model gives no per-example gradients.
        ProcessEndedError: if a check was ended from outside.
    """
    _check_at_once(launch)
    call_in_own_processes(*((_check, (launch, part)) for part in _PARTS))
