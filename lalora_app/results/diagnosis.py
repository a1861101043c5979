"""Open a finished run, and diagnose it on public data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lalora_app.data.examples import split
from lalora_app.models.backbone import Backbone, build
from lalora_app.results.curvature import top_hessian_eigenvalue
from lalora_app.results.run_folder import RunFolder, read_config
from lalora_app.results.spectra import intruder_dimensions
from lalora_app.server_state.iterate_average import final_adapter
from lalora_app.server_state.state import ServerState
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

_EXAMPLES, _BATCH = 128, 32
TOP = 10  # singular vectors per layer


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


def intruders(model: Backbone, state: ServerState) -> dict[str, int]:
    """Return the intruder dimensions per layer, among its ten leading ones (arXiv:2410.21228).

    The base is W0; the adapted weight includes the drift, and of full fine-tuning it is W0 + W.
    """
    adapted = {
        b: model.frozen_weights.computed(b).numpy(force=True) for b in model.frozen_weights.names
    }
    model.frozen_weights.set_drift({})
    bases = {b: model.frozen_weights.weight(b).detach().numpy(force=True) for b in adapted}
    found = {b: intruder_dimensions(bases[b], adapted[b], top=TOP) for b in adapted}
    model.frozen_weights.set_drift(state.drift)
    return found


def sharpness(config: Config, model: Backbone) -> float:
    """Return the top eigenvalue of the loss's Hessian on at most 128 public test examples.

    Privacy: public data only.
    """
    public = model.encode(split(config.data)[1])
    rows = np.arange(min(_EXAMPLES, len(public)))
    return top_hessian_eigenvalue(model, list(public.micro_batches(rows, _BATCH)))


def compared(folders: Sequence[Path]) -> str:
    """Return the diagnostics of several runs one below the other, such as LoRA and ``full``.

    Limit: one run has no headline.
    """
    if len(folders) == 1:
        return report(folders[0])
    parts = [f"{f.resolve().name}, method {read_config(f).method}\n{report(f)}" for f in folders]
    return "\n\n".join(parts)


def report(folder: Path) -> str:
    """Return both diagnostics of a run as text."""
    config, model, state = open_run(folder)
    counts = intruders(model, state)
    most = max(counts, key=lambda name: counts[name])
    return (
        f"intruder dimensions  {sum(counts.values())} of {TOP * len(counts)}, "
        f"the most in {most} ({counts[most]})\n"
        f"top Hessian eigenvalue  {sharpness(config, model):.4g}"
    )
