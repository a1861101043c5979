"""Image classifiers of timm, by the name of an architecture or from a local folder."""

import difflib
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lalora_app.data.images import encode_images
from lalora_app.data.sources import quiet_hub
from lalora_app.models.base import Base, cannot_load, pixel_probe, require_size
from lalora_app.models.fingerprint import NORMALISATION
from lalora_app.models.forwards import Pixels, timm_logits
from lalora_app.models.scores import CLASSIFICATION
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import TIMM, full_path, is_local
from lalora_app.settings.run_config import Model

_TARGETS = (
    "attn.qkv,attn.proj",  # Swin, ViT, DeiT, …
    "attn.q_proj,attn.v_proj,attn.proj",  # some EVA
    "attn.proj,mlp.fc1,mlp.fc2",  # SwinV2, BEiT: they read the weight of attn.qkv without a call
    "mlp.fc1,mlp.fc2",  # ConvNeXt
    "fc1,fc2",  # MLP-Mixer
)
_WEIGHTS = "model.safetensors"


def _own_class(path: str) -> Callable[..., nn.Module]:
    """Return a model class by its dotted name, which must be one of timm's."""
    module, _, name = path.rpartition(".")
    if not module.startswith("timm.models."):
        raise ConfigError(f'config.json: class="{path}" must be a class of timm.models')
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f'model.name="{TIMM}{folder}" must be a folder with a config.json')
    settings = json.loads(file.read_text("utf-8"))
    if not settings.keys() & {"class", "architecture"}:
        raise ConfigError(f'{file} must have "architecture", or a timm "class"')
    return dict(settings)


def _from_class(folder: Path, settings: dict[str, Any], model: Model, num_labels: int) -> Any:
    """Return a model built from its class and arguments; its checkpoint has no head."""
    from safetensors.torch import load_file

    arguments = settings["kwargs"] | {"num_classes": num_labels}
    require_size(model, arguments.get("img_size"))
    base: Any = _own_class(settings["class"])(**arguments)
    if model.weights == "pretrained":
        weights = load_file(folder / _WEIGHTS)
        base.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        _require_all(base, set(weights), model)
    base.pretrained_cfg = {"mean": settings["mean"], "std": settings["std"]}
    return base


def _require_all(base: nn.Module, found: set[str], model: Model) -> None:
    """Refuse a checkpoint that lacks more than the head."""
    wanted = {name for name in base.state_dict() if not name.startswith("head")}
    if missing := sorted(name for name in wanted - found if "relative_position_index" not in name):
        raise ConfigError(f'model.name="{model.name}" must have weights for {missing[0]}')


def _load(model: Model, num_labels: int) -> Any:
    import timm

    name = model.name.removeprefix(TIMM)
    arguments: dict[str, Any] = {"num_classes": num_labels}
    pretrained = model.weights == "pretrained"
    if is_local(name):
        folder = full_path(name)
        settings = _settings(folder)
        if "class" in settings:
            return _from_class(folder, settings, model, num_labels)
        name = settings["architecture"]
        known = settings.get("pretrained_cfg", {})
        overlay = {key: known[key] for key in ("mean", "std") if key in known}
        arguments["pretrained_cfg_overlay"] = overlay | {"file": str(folder / _WEIGHTS)}
    elif not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), cutoff=0.0))
        raise ConfigError(f'model.name="{model.name}" must be an architecture of timm: {near} …')
    create = partial(timm.create_model, name, pretrained=pretrained, **arguments)
    try:
        return create(img_size=model.image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create()  # a model of convolutions takes images of any size


def _head(base: Any, model: Model) -> str:
    """Return the path of the classifier, one Linear layer."""
    head = base.get_classifier()
    paths = [path for path, module in base.named_modules() if module is head]
    if not paths or not isinstance(head, nn.Linear):
        raise ConfigError(f'model.name="{model.name}" must have one Linear layer as its head')
    return str(paths[0])


@contextmanager
def _attention(model: Model) -> Iterator[None]:
    """Build with the config's attention, then restore timm's setting of the whole process."""
    from timm.layers import set_fused_attn, use_fused_attn

    before = use_fused_attn(), use_fused_attn(experimental=True)
    # timm uses fused attention in Swin only if experimental kernels are enabled.
    set_fused_attn(enable=model.attention != "eager", experimental=model.attention == "sdpa")
    try:
        yield
    finally:
        set_fused_attn(*before)


def load_timm(model: Model, num_labels: int) -> Base:
    """Return a timm model with a fresh head from torch's current seed, in float32.

    Args:
        model: ``model.name`` is ``timm:`` and an architecture, whose weights come from the hub,
            or a folder with ``config.json`` (``architecture``; or ``class`` and ``kwargs``) and
            ``model.safetensors``.
        num_labels: the number of labels of the head.

    Raises:
        ConfigError: if it cannot be found or loaded, or does not fit the config.
    """
    if model.task != "image-classification":
        raise ConfigError(f'model.task="{model.task}" must be "image-classification" for timm')
    quiet_hub()
    try:
        with _attention(model):
            base = _load(model, num_labels)
    except ConfigError:
        raise
    except Exception as error:  # the hub client and timm raise many kinds; all mean the same here
        raise cannot_load(model, error) from error
    if model.checkpointing:
        base.set_grad_checkpointing(True)
    known = base.pretrained_cfg
    pixels = Pixels(model.image_resize, model.image_size, tuple(known["mean"]), tuple(known["std"]))
    return Base(
        model=base.float(),
        task=CLASSIFICATION,
        forward=partial(timm_logits, pixels),
        encode=partial(encode_images, resize=model.image_resize, size=model.image_size),
        probe=pixel_probe(model.image_size),
        targets=_TARGETS,
        trained=(_head(base, model),),
        task_type=None,
        preprocessing={NORMALISATION: pixels.normalisation},
        processor=pixels,
    )
