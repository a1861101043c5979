"""The model card of an exported adapter: how to load it, and its privacy guarantee."""

from collections.abc import Mapping
from typing import Any

from lalora_app.methods.table import METHODS
from lalora_app.models.pretrained import public_name
from lalora_app.models.scores import format_scores, scores_in_row
from lalora_app.models.transformers_models import auto_class
from lalora_app.privacy.two_epsilons import sentences
from lalora_app.settings.names import TIMM, is_local
from lalora_app.settings.run_config import Config

_UNIT = (
    "one example of one client replaced by an empty record (zero-out); clients' data sets are "
    "disjoint and their sizes are known"
)
_UNIT_OF_TASKS = (
    "one example of one client replaced by an empty record (zero-out) of the same task; clients' "
    "data sets are disjoint, and the size of each in each task is known"
)

_CARD = """\
---
base_model: {base}
library_name: peft
tags: [{kind}, federated-learning, differential-privacy, flower]
---
# {method} adapter for {base}

Trained by LaLoRA in {rounds} federated rounds on `{data}`.
{privacy}

Test split: {quality}.
{classes}
{code}"""

_CODE = """\
```python
from peft import PeftModel
{load}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
{logits}
```
"""

_PIPELINE = """
The same with class names; the code in this folder, which computes the run's own head, is executed:

```python
from transformers import pipeline

classify = pipeline("{task}", model="path/to/this/folder", trust_remote_code=True)
```
"""

_RANDOM = """\
The base model's weights were random, so there is nothing to load the adapter on. `lalora merge`
writes the whole model.
"""

_TRANSFORMERS = """\
import transformers

base = transformers.{auto}.from_pretrained("{base}", dtype="float32"{labels})"""

_TOKENS = """\
tokenizer = transformers.AutoTokenizer.from_pretrained(
    "path/to/this/folder", trust_remote_code=False
)
model.config.pad_token_id = tokenizer.pad_token_id
tokens = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")
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
    ("image-classification", "model"): """\
processor = transformers.AutoImageProcessor.from_pretrained("path/to/this/folder")
logits = model(**processor(images, return_tensors="pt")).logits""",
    ("causal-lm", "model"): """\
tokenizer = transformers.AutoTokenizer.from_pretrained("{base}")
tokens = tokenizer(text, return_tensors="pt")
logits = model(input_ids=tokens.input_ids).logits    # (1, tokens, vocabulary)""",
}

_PRIVATE = """
| privacy | |
|---|---|
| ε, upper bound (ledger) | {epsilon:.2f} (the largest of all clients) |
{alone}{audit}
| δ | {delta:g} |
| unit | {adjacency} |
| accountant | {accountant} |

{left}Not covered: {open}."""

_LEFT = "Only tensors that were clipped per example and noised left the clients. "
_LEFT_SHARED = """\
The clients shared the noise of a sum, so there are two ε. {of_sums} {alone}

Only clipped sums left the clients, with a share of the noise and under masks. """

_NOT_PRIVATE = """
**Not private**: {reason}."""

_WITHIN = (
    ", among the classes of the example's own task only; this model chooses among all classes, so "
    "its accuracy is lower"
)

CARD_ROW = "| ε, lower bound (audit) |"  # first cells of the audit's line in the card


def unit_of(config: Config) -> str:
    """Return what the guarantee of a run hides: the two data sets that look alike."""
    return _UNIT_OF_TASKS if config.has_tasks else _UNIT


def accountant_of(config: Config) -> str:
    """Return the accountant of a run, and which releases it composes."""
    rounds = "all rounds of a task" if config.has_tasks else "all rounds"
    return f"Opacus PRV accountant, Poisson-subsampled Gaussian, composed over {rounds}"


def not_covered(config: Config) -> str:
    """Return what the guarantee of a run does not hide."""
    of_tasks = ", which task an example is in" if config.has_tasks else ""
    return f"hyper-parameter tuning, rounding of the noise, timing side channels{of_tasks}"


def _not_audited(config: Config) -> str:
    """Return the card's row on a run that has not been audited: how to do it, if it can be."""
    if config.has_tasks:
        return f"{CARD_ROW} not audited: `lalora audit` takes no run with tasks |"
    if config.privacy.shared:
        return f"{CARD_ROW} not audited: `lalora audit --fast` attacks the sums of this config |"
    return f"{CARD_ROW} not audited: `lalora audit --run` with the folder of the run |"


def privacy_sentence(config: Config, epsilon: float, alone: float | None = None) -> str:
    """Return the privacy section of the model card.

    Args:
        config: the run's config.
        epsilon: largest ε of all clients; with shared noise, of the sums.
        alone: largest ε of one client's uploads alone, with shared noise; None: own noise.
    """
    if config.privacy.private:
        row, left = ("", _LEFT) if alone is None else _of_shared_noise(alone)
        return _PRIVATE.format(
            alone=row,
            left=left,
            epsilon=epsilon,
            delta=config.privacy.delta,
            audit=_not_audited(config),
            adjacency=unit_of(config),
            accountant=accountant_of(config),
            open=not_covered(config),
        )
    seeded = config.privacy.noise == "seeded"
    return _NOT_PRIVATE.format(
        reason="the noise was drawn from a known seed" if seeded else "trained with ε = inf"
    )


def _of_shared_noise(alone: float) -> tuple[str, str]:
    """Return the table's row on ε alone, and the sentences on who must be honest for which ε."""
    of_sums, of_uploads = sentences("The first ε", "The second ε")
    row = f"| ε if one client's uploads are opened (ledger) | {alone:.2f} |\n"
    return row, _LEFT_SHARED.format(of_sums=of_sums, alone=of_uploads)


def _load_code(config: Config, base: str) -> str:
    model, labels = config.model, len(config.data.class_names)
    if model.name.startswith(TIMM):
        base = base.replace("timm/", "local-dir:", 1) if is_local(model.name[len(TIMM) :]) else base
        return _TIMM.format(base=base.removeprefix("timm/"), labels=labels, size=model.image_size)
    own_head = f", num_labels={labels}, ignore_mismatched_sizes=True"
    head = "" if model.task == "causal-lm" else own_head
    return _TRANSFORMERS.format(auto=auto_class(model), base=base, labels=head)


def _logits_code(config: Config, base: str) -> str:
    model = config.model
    if model.name.startswith(TIMM):
        return "logits = model(images)"
    logits = _LOGITS[model.task, model.pooling].replace("{base}", base)
    texts = "texts, others" if "," in config.data.input_column else "texts"
    return _TOKENS.format(texts=texts) + logits if "**tokens" in logits else logits


def _code(config: Config, base: str) -> str:
    """Return the code that loads the adapter, or the reason why nothing can load it."""
    model = config.model
    if model.weights == "random":
        return _RANDOM
    code = _CODE.format(load=_load_code(config, base), logits=_logits_code(config, base))
    if model.task == "causal-lm" or model.name.startswith(TIMM):
        return code
    return code + _PIPELINE.format(task=model.task)


def _classes(config: Config) -> str:
    names = config.data.class_names
    if config.model.task == "causal-lm":
        return ""
    listed = ", ".join(f"{label} = {name}" for label, name in enumerate(names))
    return f"Classes: {listed}.\n"


def model_card(config: Config, row: Mapping[str, Any]) -> str:
    """Return the whole model card as Markdown.

    Args:
        config: the run's config.
        row: the last row of the history.
    """
    base = public_name(config.model.name)
    within = _WITHIN * config.model.task_heads
    return _CARD.format(
        base=base,
        kind="full-fine-tuning" if METHODS[config.method].whole else "lora",
        classes=_classes(config),
        code=_code(config, base),
        method=config.method,
        rounds=row["round"],
        data=config.data.name,
        privacy=privacy_sentence(config, row["epsilon_max"], row.get("epsilon_alone")),
        quality=format_scores(scores_in_row(row), ", ") + within,
    )
