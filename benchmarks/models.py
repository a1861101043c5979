"""The models of the private-step benchmark: published widths, random weights, no downloads.

The time of a step does not depend on the values of the weights. The ratio of two variants depends
little on the depth, so deep models are reduced to a few layers of the published width.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lalora_app.models.device import narrow_frozen
from lalora_app.models.forwards import masked_mean

Batch = dict[str, Tensor]  # every tensor is (examples, ...), "labels" is (examples,)
LABELS, VOCABULARY = 3, 1000
# "proj" alone would match the patch embedding too.
SWIN_LAYERS = r".*(attn\.(qkv|proj)|mlp\.fc[12])$"


@dataclass(frozen=True)
class Row:
    """A PEFT model in eval mode, its loss per example, and a generator of random batches."""

    model: nn.Module
    losses: Callable[[Callable[..., Any], Batch], Tensor]
    make_batch: Callable[[int, torch.device], Batch]


def _adapted(base: nn.Module, **settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model: nn.Module = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, **settings)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # PEFT's initial B is zero, so the gradient of A would be zero
            nn.init.normal_(parameter, std=0.02)
    return model


def _labels(examples: int) -> Tensor:
    return torch.arange(examples) % LABELS


def _token_batches(tokens: int) -> Callable[[int, torch.device], Batch]:
    def make_batch(examples: int, device: torch.device) -> Batch:
        # no padding: ids below 5 are special tokens
        ids = torch.randint(5, VOCABULARY, (examples, tokens))
        return {"input_ids": ids.to(device), "labels": _labels(examples).to(device)}

    return make_batch


def _image_batches(pixels: int) -> Callable[[int, torch.device], Batch]:
    def make_batch(examples: int, device: torch.device) -> Batch:
        images = torch.randn(examples, 3, pixels, pixels)
        return {"images": images.to(device), "labels": _labels(examples).to(device)}

    return make_batch


def _text_losses(model: Callable[..., Any], batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return cross_entropy(logits.float(), batch["labels"], reduction="none")


def _mean_pooled_losses(model: Callable[..., Any], batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    logits = masked_mean(model(input_ids=ids).logits.float(), torch.ones_like(ids))
    return cross_entropy(logits, batch["labels"], reduction="none")


def _image_losses(model: Callable[..., Any], batch: Batch) -> Tensor:
    return cross_entropy(model(batch["images"]).float(), batch["labels"], reduction="none")


def roberta(layers: int = 2, width: int = 768, heads: int = 12, tokens: int = 128) -> Row:
    """RoBERTa-base, 2 of its 12 layers: the ratios are per layer. LoRA on query and value."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=tokens + 2,
        num_labels=LABELS,
    )
    base = RobertaForSequenceClassification(config)
    model = _adapted(base, task_type="SEQ_CLS", target_modules=["query", "value"])
    return Row(model, _text_losses, _token_batches(tokens))


def minilm(layers: int = 6, width: int = 384, heads: int = 12, tokens: int = 32) -> Row:
    """MiniLM-L6-H384 as in the default run: mean pooling, LoRA on query and value."""
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=tokens,
        num_labels=LABELS,
    )
    base = BertForTokenClassification(config)
    model = _adapted(base, task_type="TOKEN_CLS", target_modules=["query", "value"])
    return Row(model, _mean_pooled_losses, _token_batches(tokens))


def _checkpoint(model: nn.Module) -> None:
    """Compute the activations of every block twice; transformers does so in training mode only."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.base_model.model
    base.gradient_checkpointing_enable({"use_reentrant": False})
    with contextlib.suppress(AttributeError):  # some versions raise it where none are enabled
        base.disable_input_require_grads()  # torch.compile refuses them
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def llama(
    layers: int = 2,
    width: int = 512,
    heads: int = 8,
    tokens: int = 128,
    *,
    key_value_heads: int | None = None,
    inner: int | None = None,
    checkpointing: bool = False,
) -> Row:
    """A stack of two small Llama blocks with a sequence classifier. LoRA on q_proj and v_proj."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=inner or 1376 * width // 512,
        max_position_embeddings=tokens,
        num_labels=LABELS,
        pad_token_id=0,
        use_cache=False,
    )
    base = LlamaForSequenceClassification(config)
    model = _adapted(base, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    if checkpointing:
        _checkpoint(model)
    return Row(model, _text_losses, _token_batches(tokens))


def swin(pixels: int, window: int, depths: Sequence[int], width: int = 96) -> Row:
    """A Swin Transformer with LoRA on all Linear layers of its blocks."""
    from timm.models.swin_transformer import SwinTransformer

    base = SwinTransformer(
        img_size=pixels,
        window_size=window,
        embed_dim=width,
        depths=tuple(depths),
        num_heads=tuple(width // 32 * 2**stage for stage in range(len(depths))),
        num_classes=LABELS,
    )
    model = _adapted(base, target_modules=SWIN_LAYERS, modules_to_save=["head.fc"])
    return Row(model, _image_losses, _image_batches(pixels))


def vit(
    layers: int = 4, width: int = 384, heads: int = 6, pixels: int = 112, patch: int = 14
) -> Row:
    """ViT-S/14 on small images, 4 of its 12 layers. LoRA on the attention's two Linear layers."""
    from timm.models.vision_transformer import VisionTransformer

    base = VisionTransformer(
        img_size=pixels,
        patch_size=patch,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        num_classes=LABELS,
    )
    model = _adapted(base, target_modules=r".*attn\.(qkv|proj)$", modules_to_save=["head"])
    return Row(model, _image_losses, _image_batches(pixels))


ROWS: dict[str, Callable[[], Row]] = {
    "roberta-base": roberta,
    "minilm": minilm,
    "swin-tiny-224": lambda: swin(224, 7, (2, 1, 1, 1)),  # published: (2, 2, 6, 2)
    "swin-small-64": lambda: swin(64, 4, (2, 2)),
    "vit-small": vit,
    "llama": llama,
}


# All layers as published, for a GPU.
WHOLE_ROWS: dict[str, Callable[[], Row]] = {
    "roberta-base-whole": lambda: roberta(layers=12),
    "swin-tiny-whole": lambda: swin(224, 7, (2, 2, 6, 2)),
    "swin-base-whole": lambda: swin(224, 7, (2, 2, 18, 2), width=128),
    "vit-base-whole": lambda: vit(12, 768, 12, pixels=224, patch=16),
    # The blocks of Llama 3.2 1B.
    "llama-1b-whole": lambda: llama(
        16, 2048, 32, key_value_heads=8, inner=8192, checkpointing=True
    ),
}
# The same architectures in a size that takes no time, to try a benchmark itself.
TINY_ROWS: dict[str, Callable[[], Row]] = {
    "roberta-tiny": lambda: roberta(1, 32, 2, tokens=16),
    "swin-tiny-32": lambda: swin(32, 4, (2,), width=32),
    "vit-tiny": lambda: vit(2, 32, 2, pixels=28),
    "llama-tiny": lambda: llama(2, 32, 2, tokens=16, checkpointing=True),
}


def build(name: str, device: torch.device, dtype: torch.dtype) -> Row:
    """Build one model of the benchmark, with reproducible weights, on the app's device."""
    torch.manual_seed(0)
    row = (ROWS | WHOLE_ROWS | TINY_ROWS)[name]()
    narrow_frozen(row.model.to(device), dtype)
    return row
