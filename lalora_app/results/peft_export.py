"""The adapter as PEFT saves it, with a model card that states the privacy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file

from lalora_app.adapter.factors import Adapter, factor_pairs
from lalora_app.adapter.low_rank import balanced_factors, numerical_rank, sum_of_products, svd
from lalora_app.aggregation.server_state import ServerState
from lalora_app.models.backbone import Backbone
from lalora_app.models.forwards import Segmented
from lalora_app.models.pretrained import public_name
from lalora_app.results.model_card import model_card
from lalora_app.settings.run_config import Config


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
    save_file(tensors, file)
    settings.r = settings.lora_alpha = rank
    settings.save_pretrained(str(folder))


def export(
    backbone: Backbone, state: ServerState, folder: Path, config: Config, row: Mapping[str, Any]
) -> None:
    """Save the run's result so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    The drift of the frozen base becomes part of the adapter, which then has a larger rank.

    Args:
        backbone: the run's model; its adapter is overwritten.
        state: the final state of the server, head included.
        folder: the folder to write; made if missing.
        config: the run's config.
        row: the last row of the history.
    """
    backbone.load(state.adapter, state.drift)
    model = cast(PeftModel, backbone.model)
    base = public_name(config.model.name)
    model.peft_config["default"].base_model_name_or_path = base
    # Embeddings are frozen; "auto" would look for the base model on the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if state.drift:
        _with_drift(folder, state.drift)
    card = model_card(config, base, row, isinstance(backbone.forward, Segmented))
    (folder / "README.md").write_text(card, encoding="utf-8")
