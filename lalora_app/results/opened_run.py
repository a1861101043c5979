"""Open a finished run: its config, its model and its last state."""

from dataclasses import replace
from pathlib import Path

from lalora_app.models.backbone import Backbone, build
from lalora_app.results.run_folder import RunFolder, read_config
from lalora_app.server_state.iterate_average import final_adapter
from lalora_app.server_state.state import ServerState
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config


def open_run(folder: Path) -> tuple[Config, Backbone, ServerState]:
    """Return a run's config, its model on the CPU in float32, and its last state.

    The model has the adapter that the run evaluates and saves.

    Raises:
        ConfigError: if the folder is not a run's folder, or its model cannot be built.
    """
    saved = read_config(folder)
    config = replace(saved, model=replace(saved.model, device="cpu", dtype="float32"))
    run = RunFolder(folder)
    state, attempts = run.latest(), len(run.history())
    if state.attempts != attempts:
        raise ConfigError(
            f"run={folder} must have an undamaged checkpoint of its last attempt, {attempts}; the "
            f"newest one is of attempt {state.attempts}"
        )
    model, _ = build(config)
    model.load(final_adapter(state), state.drift)
    return config, model, state
