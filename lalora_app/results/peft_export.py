"""The adapter as PEFT saves it, with a model card that states the privacy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file
from torch import nn

from lalora_app.adapter.factors import Adapter, factor_pairs, kind
from lalora_app.adapter.low_rank import balanced_factors, numerical_rank, sum_of_products, svd
from lalora_app.adapter.tensor_files import save_tensors
from lalora_app.adapter.whole_linear import whole_layers
from lalora_app.models.backbone import Backbone
from lalora_app.models.pretrained import public_name
from lalora_app.models.transformers_models import conv1d_layers
from lalora_app.results.model_card import model_card
from lalora_app.results.model_files import classifier_config, write_code, write_processor
from lalora_app.server_state.iterate_average import final_adapter
from lalora_app.server_state.state import ServerState
from lalora_app.settings.names import TIMM
from lalora_app.settings.run_config import Config

_PREFIX = "base_model.model."  # of all names in a PEFT model


def _with_drift(folder: Path, drift: Adapter) -> None:
    """Add the drift of the frozen base to a saved adapter, at scale 1.

    All layers get the largest rank that any of the sums needs.

    Args:
        folder: the saved adapter.
        drift: products B·A that training has added to the base.
    """
    file, settings = folder / "adapter_model.safetensors", LoraConfig.from_pretrained(str(folder))
    tensors = load_file(file)
    scale = settings.lora_alpha / settings.r
    sums = {
        (b, a): svd(sum_of_products([(scale, tensors[b], tensors[a]), (1.0, drift[b], drift[a])]))
        for b, a in factor_pairs(drift)
    }
    rank = max(numerical_rank(found) for found in sums.values())
    for (b, a), found in sums.items():
        tensors[b], tensors[a] = balanced_factors(found, rank)
    save_tensors(tensors, file)
    settings.r = settings.lora_alpha = rank
    settings.save_pretrained(str(folder))


def _with_whole_weights(folder: Path, model: nn.Module) -> None:
    """Add the layers of whole weights to a saved adapter, which PEFT then loads as modules.

    Such a layer has no factors of a small rank. PEFT's ``modules_to_save`` replaces whole modules.
    Limit: without such layers the adapter stays as it is.

    Args:
        folder: the saved adapter.
        model: the PEFT model.
    """
    layers = whole_layers(model)
    if not layers:
        return
    file, settings = folder / "adapter_model.safetensors", LoraConfig.from_pretrained(str(folder))
    tensors = {name: x for name, x in load_file(file).items() if kind(name) != "W"}
    transposed = {path.removesuffix(".base_layer") for path in conv1d_layers(model)}
    for path, layer in layers.items():
        own = layer.plain().state_dict()
        weight = own["weight"].T if path in transposed else own["weight"]
        own["weight"] = weight.contiguous()
        tensors |= {f"{path}.{name}": x.numpy(force=True) for name, x in own.items()}
    save_tensors(tensors, file)
    paths = [path.removeprefix(_PREFIX) for path in layers]
    settings.modules_to_save = [*(settings.modules_to_save or []), *paths]
    settings.save_pretrained(str(folder))


def _has_other_names(model: Any, config: Config) -> bool:
    """Tell whether the base model gives the classes names that are not the run's.

    transformers' own LABEL_0, LABEL_1, ... are no such names.
    """
    if config.model.task == "causal-lm" or config.model.name.startswith(TIMM):
        return False
    names: dict[int, str] = model.config.id2label
    own = dict(enumerate(config.data.class_names))
    return names != own and any(name != f"LABEL_{label}" for label, name in names.items())


def _stock_base(model: Any, config: Config) -> str | None:
    """Return the base that transformers may load by itself; None: no stock base fits.

    Without a config.json, as on the hub, transformers loads this model with its own head and names
    and then the adapter. None for the mean over the tokens: the stock head computes other logits.
    None for random weights: no one can load them. None for other class names: transformers would
    show the base's names.
    """
    if config.model.pooling == "mean" or config.model.weights == "random":
        return None
    return None if _has_other_names(model, config) else public_name(config.model.name)


def _write_settings(folder: Path, base: str | None, *, conv1d: bool) -> None:
    """Write the base model, and whether its layers are Conv1D: PEFT does not know them."""
    settings = LoraConfig.from_pretrained(str(folder))
    settings.base_model_name_or_path = base
    settings.fan_in_fan_out = conv1d
    settings.save_pretrained(str(folder))


def _write_model_files(folder: Path, backbone: Backbone, config: Config) -> None:
    """Write config.json, its code, and the tokenizer or image processor of a classifier.

    transformers takes the config.json of a local folder in the place of the base model's, so that
    it computes the run's own head with the run's class names, or refuses. For random weights the
    config.json names no code and none is written, so that every loader refuses the folder.
    """
    model = config.model
    if model.task == "causal-lm" or model.name.startswith(TIMM):
        return
    base = None if model.weights == "random" else public_name(model.name)
    written = classifier_config(cast(Any, backbone.model).config, backbone, config, base)
    if base is None:
        del written.auto_map, written.custom_pipelines
    else:
        write_code(folder)
    written.save_pretrained(str(folder))
    write_processor(folder, backbone, config)


def export(
    backbone: Backbone, state: ServerState, folder: Path, config: Config, row: Mapping[str, Any]
) -> None:
    """Save the run's result so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    The drift of the frozen base becomes part of the adapter, which then has a larger rank. Whole
    weights become whole modules of the adapter. A folder
    of a transformers classifier also has a config.json with the class names, and, unless the base
    weights were random, the code of the run's head, for ``pipeline(model=folder,
    trust_remote_code=True)``.

    Args:
        backbone: the run's model; its adapter is overwritten.
        state: the final state of the server, head included; its average is saved if it has one.
        folder: the folder to write; made if missing.
        config: the run's config.
        row: the last row of the history.
    """
    backbone.load(final_adapter(state), state.drift)
    model = cast(PeftModel, backbone.model)
    # Embeddings are frozen; "auto" would look for the base model on the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    _with_whole_weights(folder, model)
    if state.drift:
        _with_drift(folder, state.drift)
    _write_settings(folder, _stock_base(model, config), conv1d=bool(conv1d_layers(model)))
    _write_model_files(folder, backbone, config)
    card = model_card(config, row)
    (folder / "README.md").write_text(card, encoding="utf-8")
