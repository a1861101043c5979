"""Files next to a run's weights: config with class names, tokenizer or image processor, code."""

import copy
import shutil
from pathlib import Path
from typing import Any

from lalora_app.models.backbone import Backbone
from lalora_app.models.forwards import Pixels, Segmented
from lalora_app.models.transformers_models import auto_class
from lalora_app.results import exported_classifier
from lalora_app.results.exported_classifier import RunConfig
from lalora_app.settings.run_config import Config

_CODE = Path(exported_classifier.__file__)


def name_classes(settings: Any, config: Config) -> None:
    """Write the names of the run's classes, if it has classes, into a config of transformers.

    Args:
        settings: the config of the model, changed in place.
        config: the run's config.
    """
    if config.model.task == "causal-lm":
        return
    settings.id2label = dict(enumerate(config.data.class_names))
    settings.label2id = {name: label for label, name in settings.id2label.items()}
    settings.problem_type = "single_label_classification"


def classifier_config(
    whole: Any, backbone: Backbone, config: Config, base: str | None
) -> RunConfig:
    """Return the config.json of a folder that is read with the code of ``exported_classifier``.

    Args:
        whole: the config of the run's model.
        backbone: the run's model.
        config: the run's config.
        base: the base model of an adapter; None: no base model is loaded.
    """
    own = copy.deepcopy(whole)
    name_classes(own, config)
    image = config.model.task == "image-classification"
    auto = "AutoModelForImageClassification" if image else "AutoModelForSequenceClassification"
    module = _CODE.stem
    pipeline = {"impl": f"{module}.RunTextPipeline", "pt": [auto], "type": "text"}
    forward = backbone.forward
    written = RunConfig(
        auto=auto_class(config.model),
        whole={name: value for name, value in own.to_dict().items() if name != "_name_or_path"},
        base=base,
        mean=config.model.pooling == "mean",
        separator=forward.separator if isinstance(forward, Segmented) else None,
        auto_map={"AutoConfig": f"{module}.RunConfig", auto: f"{module}.RunClassifier"},
        custom_pipelines={} if image else {"text-classification": pipeline},
        dtype=own.dtype,
    )
    name_classes(written, config)
    return written


def write_code(folder: Path) -> None:
    """Copy the code that a folder's config.json names."""
    shutil.copy(_CODE, folder)


def _save_tokenizer(folder: Path, backbone: Backbone, config: Config) -> None:
    tokenizer = copy.deepcopy(backbone.processor)
    segment = ["token_type_ids"] if isinstance(backbone.forward, Segmented) else []
    settings: dict[str, Any] = {
        "model_max_length": config.model.max_length,
        "model_input_names": ["input_ids", *segment, "attention_mask"],
    }
    if config.model.task == "text-classification":
        settings["padding_side"] = "right"
    for name, value in settings.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # else save_pretrained leaves it out
    tokenizer.save_pretrained(str(folder))


def _save_pixels(folder: Path, pixels: Pixels) -> None:
    """Write an image processor that resizes the shorter side, cuts out a square and normalises."""
    import transformers

    transformers.CLIPImageProcessor(
        size={"shortest_edge": pixels.resize},
        crop_size={"height": pixels.size, "width": pixels.size},
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
    ).save_pretrained(str(folder))


def write_processor(folder: Path, backbone: Backbone, config: Config) -> None:
    """Write the tokenizer or the image processor as the run used it.

    The tokenizer cuts at ``model.max-length`` and returns the inputs that the run gave its model.
    That of a text classifier pads on the right.
    """
    if config.model.task == "image-classification":
        _save_pixels(folder, backbone.processor)
    else:
        _save_tokenizer(folder, backbone, config)
