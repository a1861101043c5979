"""Diagnose finished runs: spectra of their weights, sharpness, and what they have forgotten."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lalora_app.data.examples import split
from lalora_app.diagnosis.curvature import top_hessian_eigenvalue
from lalora_app.diagnosis.forgetting import Sides, forgetting
from lalora_app.diagnosis.similarity_figure import Panel, similarity_figure
from lalora_app.diagnosis.spectra import intruder_dimensions, similarity
from lalora_app.models.backbone import Backbone
from lalora_app.results.opened_run import open_run
from lalora_app.server_state.state import ServerState
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

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


@dataclass(frozen=True)
class Diagnosis:
    """What one run has done to its base model.

    Attributes:
        title: the run's name, method and ε.
        text: the diagnostics, one per line.
        layer: the layer with the most intruder dimensions in the first run.
        similarity: of the singular vectors of this layer; None: the run does not adapt it.
    """

    title: str
    text: str
    layer: str
    similarity: np.ndarray | None


def _one_run(folder: Path, second: Sides | None, layer: str) -> Diagnosis:
    """Return the diagnosis of a run; ``layer`` "": the one with the most intruder dimensions."""
    config, model, state = open_run(folder)
    pairs = weights(model, state)
    counts = intruders(pairs)
    most = max(counts, key=lambda path: counts[path])
    layer = layer or most
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
    title = f"{folder.resolve().name}, method {config.method}, epsilon {config.privacy.epsilon:g}"
    found = similarity(*pairs[layer], top=DRAWN) if layer in pairs else None
    return Diagnosis(title, "\n".join(lines), layer, found)


def diagnosed(folders: Sequence[Path], second: Sides | None = None) -> Iterator[Diagnosis]:
    """Yield the diagnosis of each run as soon as it is known: one takes a minute or more.

    Args:
        folders: the runs' folders.
        second: training and test examples of a public second task; None: no probe of it.
    """
    layer = ""
    for folder in folders:
        run = _one_run(folder, second, layer)
        layer = run.layer
        yield run


def picture(runs: Sequence[Diagnosis]) -> str:
    """Return an SVG: for each run the similarity of singular vectors before and after training.

    All panels show one layer, the one with the most intruder dimensions in the first run.

    Raises:
        ConfigError: if a run does not adapt this layer.
    """
    panels: list[Panel] = []
    for run in runs:
        if run.similarity is None:
            raise ConfigError(f"run={run.title} must adapt the layer {run.layer}, as the first")
        panels.append((run.title, run.similarity))
    return similarity_figure(runs[0].layer, panels)
