"""Models of transformers, loaded by their stock classes, with tokenizer or image processor."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lalora_app.data.encoding import encode_sequences, encode_texts
from lalora_app.data.images import encode_images
from lalora_app.data.sources import quiet_hub
from lalora_app.models.base import Base, cannot_load, pixel_probe, require_size
from lalora_app.models.fingerprint import NORMALISATION, TOKENIZER, tokenizer_state
from lalora_app.models.forwards import (
    Pixels,
    Segmented,
    causal_logits,
    image_logits,
    mean_logits,
    text_logits,
)
from lalora_app.models.pretrained import source
from lalora_app.models.scores import CLASSIFICATION, LANGUAGE_MODEL
from lalora_app.models.tokenizers import load_tokenizer, random_texts, segment_separator
from lalora_app.private_step.shared_rows import expand_shared_rows
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Model

_HEADS = ("classifier", "score")  # the names in PEFT's own task types
# Names of queries and values, of one layer for both, or of the layers of a model without attention.
_USUAL_TARGETS = (
    "q_proj,v_proj",  # image encoders of transformers; most decoders
    "query,value",  # ALBERT, SwinV2 and others that follow BERT
    "q_lin,v_lin",  # DistilBERT
    "query_proj,value_proj",
    "q,v",  # MPNet
    "Wqkv",  # ModernBERT
    "qkv_proj",  # Phi-3
    "query_key_value",
    "qkv",
    "c_attn",
    "pwconv1,pwconv2",  # ConvNeXt
)


_CONV1D = "in_place_of_conv1d"  # attribute of the Linear layers that replace GPT-2's own


@dataclass(frozen=True)
class _Kind:
    auto: str
    forward: Callable[..., Tensor]
    task_type: str | None


_KINDS = {
    # a linear head on every token; the mean of their logits classifies
    ("text-classification", "mean"): _Kind(
        "AutoModelForTokenClassification", mean_logits, "TOKEN_CLS"
    ),
    # the architecture's own pooling and head
    ("text-classification", "model"): _Kind(
        "AutoModelForSequenceClassification", text_logits, "SEQ_CLS"
    ),
    ("causal-lm", "model"): _Kind("AutoModelForCausalLM", causal_logits, "CAUSAL_LM"),
}


def auto_class(model: Model) -> str:
    """Return the transformers class that loads the base model with its head."""
    if model.task == "image-classification":
        return "AutoModelForImageClassification"
    return _KINDS[model.task, model.pooling].auto


def _with_weights(kind: Any, where: str, model: Model, **settings: Any) -> tuple[Any, set[str]]:
    """Return the model, and the names of the modules that its checkpoint lacks."""
    if model.attention != "auto":
        settings["attn_implementation"] = model.attention
    base, info = kind.from_pretrained(
        where,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the checkpoint's head has other labels
        output_loading_info=True,
        **settings,
    )
    fresh = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    return base, {name.rpartition(".")[0] for name in fresh}


def _with_random_weights(
    kind: Any, where: str, model: Model, **settings: Any
) -> tuple[Any, set[str]]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(where, **settings)
    chosen = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    return kind.from_config(config, dtype=torch.float32, **chosen), set()


def _require_loadable(where: str, model: Model) -> None:
    """Refuse quantised weights, and an architecture without the wanted head."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(where)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f'model.name="{model.name}" must have weights that are not quantised, such as those '
            "that it was made from: LoRA trains layers of torch only"
        )
    known = transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if model.pooling == "mean" and type(config) not in known:
        raise ConfigError(
            f'model.pooling="mean" must be "model" for {config.model_type}: transformers has no '
            "classifier of its single tokens"
        )


def _load(model: Model, where: str, num_labels: int) -> tuple[Any, set[str]]:
    import transformers

    kind = getattr(transformers, auto_class(model))
    _require_loadable(where, model)
    settings = {} if model.task == "causal-lm" else {"num_labels": num_labels}
    load = _with_weights if model.weights == "pretrained" else _with_random_weights
    base, fresh = load(kind, where, model, **settings)
    return base, {name for name in fresh if name.split(".")[0] not in _HEADS}


def _default_targets(base: Any) -> tuple[str, ...]:
    """Return PEFT's own choice for the architecture, then the names in use for such layers."""
    from peft.utils import constants

    found = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type)
    own = () if found is None or isinstance(found, str) else (",".join(found),)
    return (*own, *_USUAL_TARGETS)


def _without_conv1d(module: nn.Module) -> None:
    """Replace GPT-2's layers with transposed weights (Conv1D) by equal Linear layers."""
    from transformers.pytorch_utils import Conv1D

    for name, child in list(module.named_children()):
        if not isinstance(child, Conv1D):
            _without_conv1d(child)
            continue
        outputs = child.weight.shape[1]
        linear = nn.Linear(child.weight.shape[0], outputs, bias=True, device="meta")
        linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
        linear.bias = child.bias
        setattr(linear, _CONV1D, True)
        setattr(module, name, linear)


def conv1d_layers(model: nn.Module) -> list[str]:
    """Return the paths of the Linear layers that are Conv1D layers in transformers."""
    return [path for path, module in model.named_modules() if hasattr(module, _CONV1D)]


@torch.no_grad()
def _require_causal(base: Any, ids: Tensor, model: Model) -> None:
    """Refuse a model whose tokens attend to later ones: they would depend on the padding."""
    base.eval()
    whole, cut = (causal_logits(base, part, None) for part in (ids, ids[:, :-2]))
    if (whole[:, :-2] - cut).abs().max() > 1e-4 * whole.abs().max():
        raise ConfigError(
            f'model.name="{model.name}" must be a causal model: no token may attend to a later one'
        )


def _text_base(model: Model, where: str, base: Any, fresh: set[str]) -> Base:
    kind = _KINDS[model.task, model.pooling]
    causal = model.task == "causal-lm"
    tokenizer = load_tokenizer(where, model, base)
    state = tokenizer_state(tokenizer)
    encode = encode_sequences if causal else encode_texts
    heads = [name for name in _HEADS if hasattr(base, name)]
    probe = random_texts(tokenizer, causal=causal)
    separator = None if causal else segment_separator(tokenizer, base)
    if causal:
        _require_causal(base, probe.inputs, model)
    return Base(
        model=base,
        task=LANGUAGE_MODEL if causal else CLASSIFICATION,
        forward=kind.forward if separator is None else Segmented(kind.forward, separator),
        encode=partial(
            encode,
            tokenizer=tokenizer,
            max_length=model.max_length,
            min_length=model.min_length,
        ),
        probe=probe,
        targets=_default_targets(base),
        trained=(*heads, *sorted(fresh)),
        task_type=kind.task_type,
        preprocessing={TOKENIZER: state},
        processor=tokenizer,
    )


def _normalisation(where: str, model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    import transformers

    if model.weights == "random":
        return (0.5,) * 3, (0.5,) * 3
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    return tuple(processor.image_mean), tuple(processor.image_std)


def _image_base(model: Model, where: str, base: Any, fresh: set[str]) -> Base:
    require_size(model, getattr(base.config, "image_size", None))
    mean, std = _normalisation(where, model)
    pixels = Pixels(model.image_resize, model.image_size, mean, std)
    return Base(
        model=base,
        task=CLASSIFICATION,
        forward=partial(image_logits, pixels),
        encode=partial(encode_images, resize=model.image_resize, size=model.image_size),
        probe=pixel_probe(model.image_size),
        targets=_default_targets(base),
        trained=("classifier", *sorted(fresh)),
        task_type=None,
        preprocessing={NORMALISATION: pixels.normalisation},
        processor=pixels,
    )


def load_transformers(model: Model, num_labels: int) -> Base:
    """Return a transformers model with a fresh head from torch's current seed, in float32.

    Args:
        model: ``model.name`` is a folder, a Hugging Face id or the demo's name; with
            ``model.weights="random"`` only its configuration and tokenizer are read.
        num_labels: the number of labels of the head; a language model has none.

    Raises:
        ConfigError: if it cannot be found or loaded, or does not fit the config.
    """
    from transformers.utils import logging

    quiet_hub()
    where = source(model.name)
    logging.set_verbosity_error()  # a fresh head is intended
    logging.disable_progress_bar()
    finish = _image_base if model.task == "image-classification" else _text_base
    try:
        base, fresh = _load(model, where, num_labels)
        _without_conv1d(base)
        expand_shared_rows(base)
        if model.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return finish(model, where, base, fresh)
    except ConfigError:
        raise
    except Exception as error:  # the loaders raise many kinds; all mean the same here
        raise cannot_load(model, error) from error
