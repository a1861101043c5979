"""The adapter as PEFT saves it, with a model card that states the privacy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file

from lalora_app.adapter.factors import Adapter, ServerState, pairs
from lalora_app.adapter.low_rank import balanced, rank_of, stacked, svd
from lalora_app.audit.findings import NOT_AUDITED
from lalora_app.data.sources import is_local
from lalora_app.models.backbone import Backbone
from lalora_app.models.forwards import Segmented, scores_of, told
from lalora_app.models.pretrained import TIMM, public_name
from lalora_app.models.transformers_models import auto_class
from lalora_app.settings.run_config import Config

ADJACENCY = (
    "one example of one client replaced by an empty record (zero-out); clients' data sets are "
    "disjoint and their sizes are known"
)
ACCOUNTANT = "Opacus PRV accountant, Poisson-subsampled Gaussian, composed over all rounds"

_CARD = """\
---
base_model: {base}
library_name: peft
tags: [lora, federated-learning, differential-privacy, flower]
---
# {method} adapter for {base}

Trained by LaLoRA in {rounds} federated rounds on `{data}`.
{privacy}

Test split: {quality}.

```python
from peft import PeftModel
{load}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
{logits}
```
"""

_TRANSFORMERS = """\
import transformers

base = transformers.{auto}.from_pretrained("{base}"{labels})"""

_TOKENS = """\
tokenizer = transformers.AutoTokenizer.from_pretrained("{base}")
tokens = tokenizer(
    {texts}, padding=True, padding_side="right", truncation=True, max_length={longest},
    return_token_type_ids={segmented}, return_tensors="pt",
)
"""

_TIMM = """\
import timm

base = timm.create_model("{base}", pretrained=True, num_classes={labels}, img_size={size})"""

_LOGITS = {
    ("text-classification", "mean"): """\
out = model(**tokens).logits                    # (examples, tokens, labels)
mask = tokens["attention_mask"].unsqueeze(-1)
logits = (out * mask).sum(1) / mask.sum(1)      # the mean over the tokens classifies the text""",
    ("text-classification", "model"): "logits = model(**tokens).logits",
    ("image-classification", "model"): "logits = model(images)",
    ("causal-lm", "model"): "logits = model(**tokens).logits",
}

_PRIVATE = """
| privacy | |
|---|---|
| ε, upper bound (ledger) | {epsilon:.2f} (the largest of all clients) |
{audit}
| δ | {delta:g} |
| unit | {adjacency} |
| accountant | {accountant} |

Only tensors that were clipped per example and noised left the clients. Not covered: the choice
of hyper-parameters, and floating-point effects of the noise."""

_NOT_PRIVATE = """
**Not private**: {reason}."""


def privacy_sentence(config: Config, epsilon: float) -> str:
    """Return what the model card says about privacy."""
    if config.privacy.private:
        return _PRIVATE.format(
            epsilon=epsilon,
            delta=config.privacy.delta,
            audit=NOT_AUDITED,
            adjacency=ADJACENCY,
            accountant=ACCOUNTANT,
        )
    seeded = config.privacy.noise == "seeded"
    return _NOT_PRIVATE.format(
        reason="the noise was drawn from a known seed" if seeded else "trained with ε = inf"
    )


def _load_code(config: Config, base: str) -> str:
    model, labels = config.model, config.data.num_labels
    if model.name.startswith(TIMM):
        base = base.replace("timm/", "local-dir:", 1) if is_local(model.name[len(TIMM) :]) else base
        return _TIMM.format(base=base.removeprefix("timm/"), labels=labels, size=model.image_size)
    head = "" if model.task == "causal-lm" else f", num_labels={labels}"
    if model.task == "image-classification":
        head += ", ignore_mismatched_sizes=True"
    return _TRANSFORMERS.format(auto=auto_class(model), base=base, labels=head)


def _logits_code(config: Config, base: str, segmented: bool) -> str:
    model = config.model
    texts = "texts, others" if "," in config.data.input_column else "texts"
    tokens = _TOKENS.format(base=base, texts=texts, longest=model.max_length, segmented=segmented)
    logits = _LOGITS[model.task, model.pooling]
    return tokens + logits if "tokens" in logits else logits


def _with_drift(folder: Path, drift: Adapter) -> None:
    """Rewrite a saved adapter so that it has what moved into the base too, at scale 1.

    All layers get the rank that the largest of the sums needs.
    """
    file, settings = folder / "adapter_model.safetensors", LoraConfig.from_pretrained(str(folder))
    tensors = load_file(file)
    scale = settings.lora_alpha / settings.r
    sums = {
        (b, a): svd(stacked([(scale, tensors[b], tensors[a]), (1.0, drift[b], drift[a])]))
        for b, a in pairs(drift)
    }
    rank = max(rank_of(found) for found in sums.values())
    for (b, a), found in sums.items():
        tensors[b], tensors[a] = balanced(found, rank)
    save_file(tensors, file)
    settings.r = settings.lora_alpha = rank
    settings.save_pretrained(str(folder))


def export(
    backbone: Backbone, state: ServerState, folder: Path, config: Config, row: Mapping[str, Any]
) -> None:
    """Save the run's result so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    What has moved into the base is part of the adapter, whose rank is then larger.

    Args:
        backbone: of the run; its adapter is overwritten.
        state: the final one, head included.
        folder: made if missing.
        config: of the run.
        row: the last line of the history.
    """
    backbone.load(state.adapter, state.drift)
    model = cast(PeftModel, backbone.model)
    base = public_name(config.model.name)
    model.peft_config["default"].base_model_name_or_path = base
    # Embeddings are frozen; "auto" would look for the base model on the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if state.drift:
        _with_drift(folder, state.drift)
    card = _CARD.format(
        base=base,
        load=_load_code(config, base),
        logits=_logits_code(config, base, isinstance(backbone.forward, Segmented)),
        method=config.method,
        rounds=row["round"],
        data=config.data.name,
        privacy=privacy_sentence(config, row["epsilon_max"]),
        quality=told(scores_of(row), ", "),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
