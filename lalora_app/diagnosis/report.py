"""Diagnose finished runs: spectra of their weights, sharpness, and what they have forgotten."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lalora_app.data.examples import split
from lalora_app.diagnosis.curvature import top_hessian_eigenvalue
from lalora_app.diagnosis.forgetting import forgetting
from lalora_app.diagnosis.similarity_figure import similarity_figure
from lalora_app.diagnosis.spectra import intruder_dimensions, similarity
from lalora_app.models.backbone import Backbone
from lalora_app.results.opened_run import open_run
from lalora_app.results.run_folder import read_config
from lalora_app.server_state.state import ServerState
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, Data

_EXAMPLES, _BATCH = 128, 32
TOP = 10  # singular vectors per layer
DRAWN = 40  # of them in a picture


def weights(model: Backbone, state: ServerState) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the base weight W0 and the trained weight of every adapted layer, by its path.

    The trained weight includes the drift; of full fine-tuning it is W0 + W.
    """
    frozen = model.frozen_weights
    trained = {name: frozen.computed(name).numpy(force=True) for name in frozen.names}
    frozen.set_drift({})
    bases = {name: frozen.weight(name).detach().numpy(force=True).copy() for name in trained}
    frozen.set_drift(state.drift)
    return {name.rsplit(".lora_", 1)[0]: (bases[name], trained[name]) for name in trained}


def intruders(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
    """Return the intruder dimensions of each layer, among its ten leading ones (arXiv:2410.21228).

    Args:
        pairs: the base weight and the trained weight by layer.
    """
    return {path: intruder_dimensions(*pair, top=TOP) for path, pair in pairs.items()}


def sharpness(config: Config, model: Backbone) -> float:
    """Return the top eigenvalue of the loss's Hessian on at most 128 public test examples.

    Privacy: public data only.
    """
    public = model.encode(split(config.data)[1])
    rows = np.arange(min(_EXAMPLES, len(public)))
    return top_hessian_eigenvalue(model, list(public.micro_batches(rows, _BATCH)))


def _report(folder: Path, second: Data | None) -> str:
    config, model, state = open_run(folder)
    counts = intruders(weights(model, state))
    most = max(counts, key=lambda path: counts[path])
    lines = [
        f"intruder dimensions  {sum(counts.values())} of {TOP * len(counts)}, "
        f"the most in {most} ({counts[most]})",
        f"top Hessian eigenvalue  {sharpness(config, model):.4g}",
    ]
    if second is not None:
        probes = forgetting(config, model, state.drift, second)
        lines.append(
            f"linear probe of the second task  accuracy {probes.before:.4f} before the run, "
            f"{probes.after:.4f} after it"
        )
    return "\n".join(lines)


def compared(folders: Sequence[Path], second: Data | None = None) -> str:
    """Return the diagnostics of several runs one below the other, such as LoRA and ``full``.

    Args:
        folders: the runs' folders.
        second: the run config's table ``data`` of a public second task; None: no probe of it.

    Limit: one run has no headline.
    """
    reports = [_report(folder, second) for folder in folders]
    if len(folders) == 1:
        return reports[0]
    titles = [f"{f.resolve().name}, method {read_config(f).method}" for f in folders]
    return "\n\n".join("\n".join(part) for part in zip(titles, reports, strict=True))


def picture(folders: Sequence[Path]) -> str:
    """Return an SVG: for each run the similarity of singular vectors before and after training.

    All panels show one layer, the one with the most intruder dimensions in the first run.

    Raises:
        ConfigError: if a run does not adapt this layer.
    """
    panels: dict[str, np.ndarray] = {}
    layer = ""
    for folder in folders:
        config, model, state = open_run(folder)
        pairs = weights(model, state)
        if not layer:
            counts = intruders(pairs)
            layer = max(counts, key=lambda path: counts[path])
        if layer not in pairs:
            raise ConfigError(f"run={folder} must adapt the layer {layer}, as {folders[0]} does")
        title = f"{folder.resolve().name}: {config.method}, ε = {config.privacy.epsilon:g}"
        panels[title] = similarity(*pairs[layer], top=DRAWN)
    return similarity_figure(layer, panels)
