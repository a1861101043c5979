"""Read which run or comparison is to be started, from the command and the app's config."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE, full_path
from lalora_app.settings.overrides import merged, read_toml
from lalora_app.settings.run_config import Config, Scalar, flatten, from_tables, parse

CLIENTS_PER_GPU = 4  # default
_NODES = 4
_CONFIG_TABLE = ("tool", "flwr", "app", "config")


@dataclass(frozen=True)
class Launch:
    """A run, or a comparison, as it will be started.

    Attributes:
        config: its parsed config.
        defaults: the app's flat config, for the plan of a comparison.
        nodes: the number of simulated clients.
        app: the folder of the app.
        values: the values of the keys that are not the app's own.
        clients_per_gpu: the number of clients that train on one GPU at the same time.
        workers: the number of processes of the engine "local"; 0: one per core, or per share of a
            GPU, and at most one per client.
    """

    config: Config
    defaults: dict[str, Any]
    nodes: int
    app: Path = Path()
    values: dict[str, Scalar] = field(default_factory=dict)
    clients_per_gpu: int = CLIENTS_PER_GPU
    workers: int = 0


def app_defaults(app: Path) -> dict[str, Any]:
    """Return the flat run config of an app's pyproject.toml.

    Raises:
        ConfigError: if the folder holds no Flower app with a run config.
    """
    project = app / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(f"app={app} must be a folder with the app's pyproject.toml")
    table: Any = read_toml(project, f"app={app}: {project}")
    for name in _CONFIG_TABLE:
        table = table.get(name) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        raise ConfigError(f"app={app} must have a [{'.'.join(_CONFIG_TABLE)}] table in {project}")
    return from_tables(table)


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


def read_launch(app: Path, overrides: Iterable[str], nodes: int | None = None) -> Launch:
    """Return what is to be started.

    Args:
        app: folder of the app.
        overrides: ``-c`` options of the command; with ``resume-from``, all other keys are taken
            from the run's own config.
        nodes: number of simulated clients; None: as many as the resumed run has, 1 for
            a ``central`` run, or 4.

    Raises:
        ConfigError: for a bad key or value.
    """
    own, clients = merged(overrides), None
    defaults = app_defaults(app)
    if own.get("resume-from", NONE) != NONE:
        saved, clients = resumed_config(own)
        own = saved | own
        if nodes and clients and nodes != clients:
            raise ConfigError(f"--nodes {nodes} must be {clients}, as in resume-from")
    config = parse(defaults | own)
    values = {key: value for key, value in flatten(config).items() if key in own}
    clients = clients or (1 if config.central else _NODES)
    return Launch(config, defaults, nodes or clients, app, values)
