"""Tokenizers of transformers: loaded, checked against their model, and random texts of them."""

from typing import Any

import torch

from lalora_app.data.encoding import Batch
from lalora_app.models.base import language_probe, text_probe
from lalora_app.models.forwards import segments
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Model


def _position_offset(base: Any) -> int | None:
    """Return the id of the padding token from which positions are counted; None for most models.

    RoBERTa and similar models number positions from padding_idx + 1.
    """
    offset: int | None = getattr(getattr(base.base_model, "embeddings", None), "padding_idx", None)
    return offset


def _longest(base: Any, tokenizer: Any) -> int:
    """Return the most tokens that a text may have."""
    positions = getattr(base.config, "max_position_embeddings", -1)
    if positions < 0:  # the model has no limit, and XLNet says so by -1
        return int(tokenizer.model_max_length)
    offset = _position_offset(base)
    if offset is not None:
        positions -= offset + 1
    return int(min(positions, tokenizer.model_max_length))


def _require_padding(tokenizer: Any, model: Model) -> None:
    """Let a tokenizer without a padding token, as of GPT-2 or Llama, pad with its end of text.

    The models of transformers then classify a text at its last token that is no end of text: the
    same token whether the text is padded or not, also if the text itself holds such tokens.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f'model.name="{model.name}" must have a tokenizer with a padding token or a token for '
            'the end of a text ("pad_token" or "eos_token" in its tokenizer_config.json)'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _require_embedded(tokenizer: Any, model: Model, base: Any) -> None:
    """Refuse a tokenizer with a token outside the model's embedding table.

    Such a token crashes the forward pass; the failed round would reveal that a text contains it.
    """
    largest, rows = max(tokenizer.get_vocab().values()), base.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ConfigError(
            f'model.name="{model.name}" must embed every token of its tokenizer: token {largest} '
            f"is outside its table of {rows} rows"
        )


def _require_length(tokenizer: Any, model: Model, base: Any) -> None:
    """Refuse a ``model.max-length`` that the model cannot take, or that leaves no room for text."""
    longest = _longest(base, tokenizer)
    if model.max_length > longest:
        raise ConfigError(
            f"model.max-length={model.max_length} must be at most {longest}, the model's longest"
        )
    added = tokenizer.num_special_tokens_to_add(pair=True)
    if model.max_length <= added:  # the tokenizer would cut no text
        raise ConfigError(
            f"model.max-length={model.max_length} must be above {added}, the tokens that the "
            "tokenizer adds to a pair of texts"
        )


def load_tokenizer(where: str, model: Model, base: Any) -> Any:
    """Return the tokenizer of a model, and tell the model its padding token.

    Args:
        where: a folder or a Hugging Face id.
        model: the run config's table ``model``.
        base: the model of transformers; its config is changed.

    Raises:
        ConfigError: if the tokenizer or ``model.max-length`` does not fit the model.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    # Without tokenizer files, transformers returns a tokenizer with special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f'model.name="{model.name}" must come with a tokenizer')
    if model.task == "text-classification":
        _require_padding(tokenizer, model)
    _require_embedded(tokenizer, model, base)
    # RoBERTa keeps its own token: another one would shift its positions when loaded.
    if _position_offset(base) is None:
        base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _require_length(tokenizer, model, base)
    return tokenizer


def segment_separator(tokenizer: Any, base: Any) -> int | None:
    """Return the token that ends the first text of a pair.

    None: the model has no segment embedding, or the tokenizer marks segments by another rule.
    """
    embedded = getattr(base.config, "type_vocab_size", 0) > 1
    pair = tokenizer("a", "b")
    if not embedded or tokenizer.sep_token_id is None or "token_type_ids" not in pair:
        return None
    separator = int(tokenizer.sep_token_id)
    ruled = segments(torch.tensor([pair["input_ids"]]), separator).tolist()
    return separator if ruled == [pair["token_type_ids"]] else None


def random_texts(tokenizer: Any, *, causal: bool) -> Batch:
    """Return random texts of ordinary tokens that end as the tokenizer ends a text."""
    special = set(tokenizer.all_special_ids)
    words = sorted(set(tokenizer.get_vocab().values()) - special)
    if causal:
        return language_probe(words)
    last = tokenizer("a")["input_ids"][-1:]
    end = last[0] if last and last[0] in special else None
    return text_probe(words, end, tokenizer.pad_token_id)
