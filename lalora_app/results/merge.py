"""Write a run's result as plain weights: base, drift and adapter in one model."""

import copy
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lalora_app.adapter.whole_linear import whole_layers
from lalora_app.models.backbone import Backbone
from lalora_app.models.forwards import Pixels
from lalora_app.models.transformers_models import auto_class, conv1d_layers
from lalora_app.results.exported_classifier import RunClassifier
from lalora_app.results.model_files import (
    classifier_config,
    name_classes,
    write_code,
    write_processor,
)
from lalora_app.results.opened_run import open_run
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import TIMM, full_path
from lalora_app.settings.run_config import Config


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a folder to write, which becomes ``out`` when the block ends without an error.

    Raises:
        ConfigError: if ``out`` holds files or is one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT={out} must be a new folder or an empty one")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    new.mkdir()
    try:
        yield new
        new.replace(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _plain(model: nn.Module) -> Any:
    """Return a copy of a PEFT model of plain layers, its adapter merged into the weights."""
    own = copy.deepcopy(model)
    for module in own.modules():
        vars(module).pop("forward", None)  # the engine set it; a merged model uses its class's own
    for path, layer in whole_layers(own).items():
        own.set_submodule(path, layer.plain())
    return own.merge_and_unload()  # type: ignore[operator]


def _restore_conv1d(model: Any) -> None:
    """Give a transformers model back its layers of transposed weights (Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    for path in conv1d_layers(model):
        linear = model.get_submodule(path)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        layer.bias = linear.bias
        model.set_submodule(path, layer)


def _save_transformers(folder: Path, model: Any, backbone: Backbone, config: Config) -> None:
    _restore_conv1d(model)
    if config.model.pooling == "mean":
        model = RunClassifier(classifier_config(model.config, backbone, config, None), model)
        write_code(folder)
    else:
        name_classes(model.config, config)
    model.save_pretrained(str(folder))
    write_processor(folder, backbone, config)


# Entries of a timm config that describe the architecture, and not the base's files or labels.
_OF_THE_ARCHITECTURE = ("first_conv", "classifier", "fixed_input_size", "crop_mode")


def _timm_settings(model: Any, pixels: Pixels, names: Sequence[str]) -> dict[str, Any]:
    """Return the config.json of a timm model, as timm's hub has it."""
    own = model.pretrained_cfg
    known = {name: own[name] for name in _OF_THE_ARCHITECTURE if name in own}
    seen = {"input_size": (3, pixels.size, pixels.size), "mean": pixels.mean, "std": pixels.std}
    cut = {"interpolation": "bicubic", "crop_pct": pixels.size / pixels.resize}
    takes_size = "img_size" in inspect.signature(type(model).__init__).parameters
    return {
        "architecture": own["architecture"],
        "num_classes": len(names),
        "num_features": model.num_features,
        "label_names": list(names),
        "model_args": {"img_size": pixels.size} if takes_size else {},
        "pretrained_cfg": known | seen | cut | {"num_classes": len(names)},
    }


def _save_timm(folder: Path, model: Any, pixels: Pixels, config: Config) -> None:
    """Write a timm model in the hub's format, or in that of the source folder with a ``class``."""
    from safetensors.torch import save_file

    names = config.data.class_names
    if "architecture" in model.pretrained_cfg:
        settings = _timm_settings(model, pixels, names)
    else:
        source = full_path(config.model.name.removeprefix(TIMM)) / "config.json"
        settings = json.loads(source.read_text("utf-8")) | {"label_names": list(names)}
        settings["kwargs"]["num_classes"] = len(names)
    (folder / "config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _timm_code(out: Path) -> str:
    settings = json.loads((out / "config.json").read_text("utf-8"))
    if "architecture" in settings:
        return f'import timm\nmodel = timm.create_model("local-dir:{out}", pretrained=True)'
    module = settings["class"].rpartition(".")[0]
    return (
        f"import json, pathlib, safetensors.torch, {module}\n"
        f'settings = json.loads(pathlib.Path("{out}/config.json").read_text("utf-8"))\n'
        f'model = {settings["class"]}(**settings["kwargs"])\n'
        f'model.load_state_dict(safetensors.torch.load_file("{out}/model.safetensors"))'
    )


def _how_to_load(config: Config, out: Path) -> str:
    """Return lines of Python that load a merged folder as ``model``."""
    model = config.model
    if model.name.startswith(TIMM):
        return _timm_code(out)
    auto, trust = auto_class(model), ""
    if model.pooling == "mean":
        auto, trust = "AutoModelForSequenceClassification", ", trust_remote_code=True"
    return f'import transformers\nmodel = transformers.{auto}.from_pretrained("{out}"{trust})'


def merge(folder: Path, out: Path) -> str:
    """Write the run's result as plain weights, in float32: base, drift and adapter in one.

    A transformers model is saved in its own format, with tokenizer or image processor; a timm model
    as timm saves it. A run with ``model.pooling="mean"`` is saved with the code of its head, since
    transformers has no class for it.

    Args:
        folder: the run's folder.
        out: the folder to write; a new one or an empty one. An error leaves it as it was.

    Returns:
        Lines of Python that load it as ``model``.

    Raises:
        ConfigError: if ``out`` holds files, or the run cannot be opened.
    """
    with _whole_or_nothing(out) as new:
        config, backbone, _ = open_run(folder)
        model = _plain(backbone.model)
        if config.model.name.startswith(TIMM):
            _save_timm(new, model, backbone.processor, config)
        else:
            _save_transformers(new, model, backbone, config)
    return _how_to_load(config, out)
