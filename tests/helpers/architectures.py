"""Tiny random models of every architecture that the app trains, saved as their users save them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from conftest import WORDS, save_tokenizer

_BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
_POSITIONS = {"relative_attention": True, "max_relative_positions": 8, "type_vocab_size": 0}
_BOTH_WAYS = {"pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
_DEBERTA = _BERT | _POSITIONS | _BOTH_WAYS
_LLAMA = _BERT | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
_GPT2 = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
_ENDS = {"bos_token_id": 2, "eos_token_id": 3}
_SLIDING = {"sliding_window": 4}
_PHI = {"partial_rotary_factor": 0.5}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": 0}

# name -> (transformers' model type, its sizes)
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT | {"pad_token_id": 1}),
    "distilbert": (
        "distilbert",
        _DISTILBERT | {"vocab_size": len(WORDS), "max_position_embeddings": 20},
    ),
    "electra": ("electra", _BERT | {"embedding_size": 8}),
    "albert": ("albert", _BERT | {"embedding_size": 8, "inner_group_num": 1}),
    "deberta": ("deberta", _DEBERTA),
    # as in v2-xlarge and v3: queries and keys of the positions by the layers of the tokens
    "deberta-v3": (
        "deberta-v2",
        _DEBERTA | {"share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-v2": ("deberta-v2", _DEBERTA),
    "longformer": (
        "longformer",
        _BERT | {"attention_window": [4, 4], "pad_token_id": 1, "sep_token_id": 3},
    ),
    "modernbert": (
        "modernbert",
        _BERT
        | _ENDS
        | {"local_attention": 4, "global_attn_every_n_layers": 2}
        | {"cls_token_id": 2, "sep_token_id": 3},
    ),
    "gpt2": ("gpt2", _GPT2 | _ENDS),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | _SLIDING),
    # its tokenizer adds a token
    "qwen2": ("qwen2", _LLAMA | {"tie_word_embeddings": True, "vocab_size": len(WORDS) + 1}),
    "qwen3": ("qwen3", _LLAMA),
    "gemma": ("gemma", _LLAMA),
    "gemma2": ("gemma2", _LLAMA | _SLIDING),
    "gemma3": ("gemma3_text", _LLAMA | _SLIDING),
    "phi": ("phi", _BERT | _ENDS | _PHI),
    "phi3": ("phi3", _LLAMA | {"num_key_value_heads": 2}),
    "opt": (
        "opt",
        _BERT | _ENDS | {"ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    "bloom": (
        "bloom",
        _ENDS | {"vocab_size": len(WORDS), "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "falcon": ("falcon", _BERT | _ENDS),
    "gpt-neox": ("gpt_neox", _BERT | _ENDS),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "t5": (
        "t5",
        _ENDS
        | {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2}
        | {"num_heads": 2, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0},
    ),
}


def text_model(kind: str, head: str = "SequenceClassification", **changes: Any) -> nn.Module:
    """A model of transformers with random weights; its biases are random too."""
    import transformers

    torch.manual_seed(0)
    model_type, sizes = TEXT_MODELS[kind]
    config = transformers.AutoConfig.for_model(model_type, **sizes | changes)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_text_model(kind: str, folder: Path, **changes: Any) -> str:
    """A folder of the model with the word tokenizer."""
    text_model(kind, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


_SMALL = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 2, "intermediate_size": 32}
_STAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4}
_STAGES |= {"depths": [1, 1], "num_heads": [1, 2]}
IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "vit": _SMALL,
    "deit": _SMALL,
    "beit": _SMALL | {"use_relative_position_bias": True},
    "dinov2": _SMALL,
    "swin": _STAGES,
    "swinv2": _STAGES,
    "convnext": {
        "image_size": 16,
        "patch_size": 2,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_stages": 2,
    },
    "convnextv2": {
        "image_size": 16,
        "patch_size": 2,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_stages": 2,
    },
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
}


def save_image_model(kind: str, folder: Path) -> str:
    """A folder of a model of transformers with an image processor."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **IMAGE_MODELS[kind])
    if kind == "deit":  # of its two classes, the one that the file names is loaded
        config.architectures = ["DeiTForImageClassification"]
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        folder
    )
    return str(folder)
