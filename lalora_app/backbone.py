"""The frozen backbone with its LoRA layers: found, checked, built once a process, evaluated."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lalora_app.adapter import Adapter
from lalora_app.config import Config, ConfigError, Lora, Model
from lalora_app.data import Batch
from lalora_app.device import autocast, narrow_frozen, pick_device, pick_dtype, to_device
from lalora_app.pretrained import load_base
from lalora_app.privacy.expanded import ExpandedEngine
from lalora_app.privacy.layout import check_layout
from lalora_app.privacy.per_example import PerExampleEngine

_CHECK_EXAMPLES, _CHECK_TOKENS = 3, 6


@dataclass
class Backbone:
    """A PEFT model, its trainable tensors by wire name, and its tokenizer.

    The same instance serves every client of a process; only the adapter is loaded anew.
    """

    model: nn.Module
    tokenizer: Any
    engine: PerExampleEngine
    device: torch.device
    dtype: torch.dtype
    pooling: str
    targets: int

    def __post_init__(self) -> None:
        """Let the engine prepare the forward that trains; an evaluation takes it as it is."""
        self._train_forward = self.engine.prepare(self._logits)

    def adapter(self) -> Adapter:
        """Return a copy of the current factors and head, in float32 on the CPU."""
        parameters = self.engine.parameters.items()
        return {name: p.detach().float().cpu().numpy().copy() for name, p in parameters}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Overwrite factors and head; names must be the backbone's own, shapes must fit."""
        for name, parameter in self.engine.parameters.items():
            parameter.copy_(torch.from_numpy(adapter[name]))

    def _logits(self, inputs: Tensor, mask: Tensor) -> Tensor:
        attention = _attention(mask, self.model)
        with autocast(self.device, self.dtype):
            out: Tensor = self.model(input_ids=inputs, attention_mask=attention).logits.float()
        return masked_mean(out, mask) if self.pooling == "mean" else out

    def logits(self, batch: Batch) -> Tensor:
        """Return (examples, labels) for a padded batch."""
        return self._logits(*self._inputs(batch))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return to_device(batch.inputs, self.device), to_device(batch.mask, self.device)

    def losses(self, batch: Batch) -> Tensor:
        """Return (examples,): the cross entropy of each example on its own."""
        labels = to_device(batch.labels, self.device)
        logits = self._train_forward(*self._inputs(batch))
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    @torch.inference_mode()
    def evaluate(self, batches: Iterable[Batch], num_labels: int) -> dict[str, float]:
        """Return accuracy and balanced accuracy (mean recall of the labels that occur)."""
        confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
        for batch in batches:
            predicted = self.logits(batch).argmax(1).cpu().numpy()
            np.add.at(confusion, (batch.labels.numpy(), predicted), 1)
        return accuracies(confusion)


def _attention(mask: Tensor, model: Any) -> Tensor:
    """Return what the model takes as its attention mask, for (examples, tokens).

    transformers reads a 2-D mask's values to find that nothing is padded, for which a GPU would
    have to be waited for; a ready 4-D mask is taken as it is.
    """
    if mask.device.type == "cpu" or model.config._attn_implementation != "sdpa":
        return mask
    return whole_mask(mask)


def whole_mask(mask: Tensor) -> Tensor:
    """Return (examples, 1, tokens, tokens), true where a token may be looked at."""
    return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


def masked_mean(token_logits: Tensor, mask: Tensor) -> Tensor:
    """Return (examples, labels): the mean of (examples, tokens, labels) over unmasked tokens.

    The head is linear, so this is the head applied to the mean-pooled hidden states.
    """
    weights = mask[..., None].to(token_logits)
    return (token_logits * weights).sum(1) / weights.sum(1)


def accuracies(confusion: np.ndarray) -> dict[str, float]:
    """Return accuracy and balanced accuracy of a (labels, predictions) count matrix."""
    totals = confusion.sum(1)
    recalls = np.diag(confusion)[totals > 0] / totals[totals > 0]
    accuracy = float(np.trace(confusion) / totals.sum())
    return {"accuracy": accuracy, "balanced_accuracy": float(recalls.mean())}


def _target_sizes(base: nn.Module, lora: Lora) -> list[int]:
    wanted = tuple(target.strip() for target in lora.targets.split(","))
    matches = [m for path, m in base.named_modules() if path.split(".")[-1] in wanted]
    layers = [m for m in matches if isinstance(m, nn.Linear)]
    if not layers or len(layers) < len(matches):
        names = sorted({p.split(".")[-1] for p, m in base.named_modules() if type(m) is nn.Linear})
        raise ConfigError(
            f'lora.targets="{lora.targets}" must name Linear layers of the model; it has '
            + ", ".join(names)
        )
    return [min(layer.in_features, layer.out_features) for layer in layers]


def wire_name(parameter: str) -> str:
    """Return PEFT's saved name of a trainable parameter of a PEFT model."""
    return parameter.replace(".modules_to_save.default", "").replace(".default", "")


def _check_length(model: Model, base: Any, tokenizer: Any) -> None:
    positions = getattr(base.config, "max_position_embeddings", tokenizer.model_max_length)
    longest = min(positions, tokenizer.model_max_length)
    if model.max_length > longest:
        raise ConfigError(
            f"model.max-length={model.max_length} must be at most {longest}, the model's longest"
        )


def _with_adapters(base: nn.Module, lora: Lora, task: str) -> nn.Module:
    """Return the PEFT model, in eval mode for good.

    The frozen backbone trains no statistics and drops nothing: the noise of the private step
    regularises more than dropout would.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[target.strip() for target in lora.targets.split(",")],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        adapted: nn.Module = get_peft_model(base, settings).eval()
    return adapted


def _engine(model: nn.Module, parameters: dict[str, nn.Parameter], kernel: str) -> PerExampleEngine:
    if kernel == "compiled":
        return ExpandedEngine(model, parameters)
    return PerExampleEngine(model, parameters, kernel)


def _build(model: Model, lora: Lora, num_labels: int, seed: int) -> Backbone:
    device = pick_device(model.device)
    # A (Kaiming) and the head are drawn here: from the run's seed, never from data.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base, tokenizer = load_base(model, num_labels)
        _check_length(model, base, tokenizer)
        sizes = _target_sizes(base, lora)
        if lora.rank > min(sizes):
            raise ConfigError(
                f"lora.rank={lora.rank} must be at most {min(sizes)}, the smallest target layer"
            )
        task = "TOKEN_CLS" if model.pooling == "mean" else "SEQ_CLS"
        adapted = _with_adapters(base, lora, task).to(device)
    trainable = {wire_name(n): p for n, p in adapted.named_parameters() if p.requires_grad}
    dtype = pick_dtype(model.dtype, device)
    narrow_frozen(adapted, dtype)
    return Backbone(
        model=adapted,
        tokenizer=tokenizer,
        engine=_engine(adapted, trainable, lora.kernel),
        device=device,
        dtype=dtype,
        pooling=model.pooling,
        targets=len(sizes),
    )


def _check(backbone: Backbone) -> None:
    """Prove the layout on random tokens: data has no part in it."""
    vocabulary = len(backbone.tokenizer)
    generator = torch.Generator().manual_seed(0)
    shape = (_CHECK_EXAMPLES, _CHECK_TOKENS)
    batch = Batch(
        torch.randint(vocabulary, shape, generator=generator),
        torch.ones(shape, dtype=torch.long),
        torch.arange(_CHECK_EXAMPLES) % 2,
    )

    def losses(rows: list[int]) -> Tensor:
        part = Batch(batch.inputs[rows], batch.mask[rows], batch.labels[rows])
        return backbone.losses(part)

    check_layout(backbone.engine, losses, _CHECK_EXAMPLES)


@lru_cache(maxsize=1)
def _checked(model: Model, lora: Lora, num_labels: int, seed: int) -> tuple[Backbone, Adapter]:
    backbone = _build(model, lora, num_labels, seed)
    start = backbone.adapter()
    _check(backbone)
    return backbone, start


def build(config: Config) -> tuple[Backbone, Adapter]:
    """Return the process's backbone and the initial adapter: A Kaiming, B zero, head random.

    Raises:
        ConfigError: if the model, its targets, the rank or the device do not fit.
        LayoutError: if per-example gradients cannot be had from this model.
    """
    backbone, start = _checked(config.model, config.lora, config.data.num_labels, config.seed)
    return backbone, {name: array.copy() for name, array in start.items()}
