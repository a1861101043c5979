"""The classifier of a LaLoRA run as a model of transformers, read with ``trust_remote_code=True``.

This file is copied next to the config.json that names it. transformers has no class for a run whose
head classifies the mean over the tokens, and none for an adapter with its own labels.
transformers would compute another head's logits, so without this code the folder is refused.
"""

import importlib
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


class RunConfig(transformers.PreTrainedConfig):  # type: ignore[misc]
    """The config of a run's classifier: its model, its head, and the base of an adapter.

    Args:
        auto: the class of transformers that loads the run's model.
        whole: the config of that model, with its ``model_type``.
        base: the base model of an adapter, a folder or a Hugging Face id; None: no base model is
            loaded.
        mean: whether the mean of the token logits classifies a text.
        separator: the id of the token that ends the first text of a pair; None: the model takes no
            segments.
    """

    model_type = "lalora_run"

    def __init__(
        self,
        auto: str = "",
        whole: dict[str, Any] | None = None,
        base: str | None = None,
        mean: bool = False,
        separator: int | None = None,
        **others: Any,
    ):
        self.auto, self.whole, self.base = auto, whole, base
        self.mean, self.separator = mean, separator
        super().__init__(**others)

    def model_config(self) -> Any:
        """Return the config of the run's model."""
        return transformers.AutoConfig.for_model(**dict(self.whole or {}))


class RunClassifier(transformers.PreTrainedModel):  # type: ignore[misc]
    """The run's model, which returns one row of logits per text or image.

    Args:
        config: the folder's config.json.
        model: the run's model; None: one without weights, for ``from_pretrained`` to fill.
    """

    config_class = RunConfig

    def __init__(self, config: RunConfig, model: Any = None):
        super().__init__(config)
        if model is None:
            auto, asked = getattr(transformers, config.auto), torch.get_default_dtype()
            model = auto.from_config(config.model_config(), dtype=asked)
        else:
            for module in model.modules():
                module._is_hf_initialized = True  # else post_init would draw new weights
        self.model = model
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **options: Any) -> "RunClassifier":
        """Return the model of a folder; of an adapter, with the adapter merged into its base."""
        config = options.pop("config", None) or RunConfig.from_pretrained(folder)
        if config.base is None:
            whole: RunClassifier = super().from_pretrained(folder, *args, config=config, **options)
            return whole
        taken = ("dtype", "device_map", "token", "cache_dir", "local_files_only")
        base = getattr(transformers, config.auto).from_pretrained(
            config.base,
            config=config.model_config(),
            ignore_mismatched_sizes=True,  # the adapter has its own head
            **{name: options[name] for name in taken if name in options},
        )
        peft = importlib.import_module("peft")  # only here: merged weights do not need it
        merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
        config.base = None  # save_pretrained writes all weights
        classifier: RunClassifier = cls(config, merged).eval()
        return classifier

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> SequenceClassifierOutput:
        """Return the logits (examples, labels) of texts or images.

        Args:
            input_ids: (examples, tokens).
            attention_mask: (examples, tokens), 0 on padding; None: there is no padding.
            others: ``pixel_values`` (examples, 3, height, width). ``token_type_ids`` are computed
                from the separator, as in the run.
        """
        others.pop("token_type_ids", None)
        if input_ids is not None:
            others["input_ids"], others["attention_mask"] = input_ids, attention_mask
        if self.config.separator is not None and input_ids is not None:
            ends = (input_ids == self.config.separator).long()
            others["token_type_ids"] = (ends.cumsum(1) - ends).clamp(max=1)
        logits = self.model(**others).logits
        if self.config.mean and attention_mask is None:
            logits = logits.mean(1)
        elif self.config.mean and attention_mask is not None:
            kept = attention_mask[..., None].to(logits)  # (examples, tokens, 1)
            logits = (logits * kept).sum(1) / kept.sum(1)
        return SequenceClassifierOutput(logits=logits)


class RunTextPipeline(transformers.TextClassificationPipeline):  # type: ignore[misc]
    """The pipeline of transformers, which cuts long texts as the run did."""

    def preprocess(self, inputs: Any, truncation: bool = True, **options: Any) -> Any:
        """Return the tokens of a text or a pair of texts, cut at the tokenizer's longest."""
        return super().preprocess(inputs, truncation=truncation, **options)

    def check_model_type(self, supported_models: Any) -> None:
        """Accept the run's classifier, which is no class of transformers itself."""
