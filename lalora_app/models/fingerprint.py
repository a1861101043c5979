"""Hashes of a base model's frozen weights and of its preprocessing, for comparison between sites.

Equal code does not imply equal weights: two sites may hold another hub revision or local folder.
Privacy: only public files are hashed; no private data is involved.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lalora_app.models.pretrained import revision
from lalora_app.settings.run_config import Model
from lalora_app.wire.code_version import code_hash

_UNUSED_HEAD = ".original_module."  # PEFT's copy of a head that is trained whole
WEIGHTS, TOKENIZER, NORMALISATION = "weights", "tokenizer", "normalisation"


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the frozen parameters and the buffers of a PEFT model.

    Of floating-point buffers that are computed and not stored, such as rotary frequencies, only
    name and shape count: platforms round their last bits differently.
    """
    stored = model.state_dict().keys()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and _UNUSED_HEAD not in name:
            yield name, parameter.detach()
    for name, buffer in model.named_buffers():
        computed = name not in stored and buffer.is_floating_point()
        yield name, torch.zeros_like(buffer) if computed else buffer


def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 of all frozen tensors: names, types, shapes and bytes, ordered by name.

    LoRA factors and head are left out, so all ranks of one base model have one hash.

    Args:
        model: a PEFT model on the CPU, with the weights as they were loaded in float32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_frozen(model), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_state(tokenizer: Any) -> str:
    """Return a tokenizer's vocabulary and rules as JSON, without its paths.

    Truncation and padding are left out: every call sets its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    state["side"] = tokenizer.truncation_side
    state["special"] = {name: str(word) for name, word in tokenizer.special_tokens_map.items()}
    return json.dumps(state, sort_keys=True)


def fingerprint(model: nn.Module, preprocessing: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each part of a base model that all sites must share.

    Limit: settings of the architecture without a tensor, such as its activation, have no hash.

    Args:
        model: a PEFT model, see :func:`weights_hash`.
        preprocessing: the state of the tokenizer or of the images' normalisation, by name.
    """
    hashes = {name: hashlib.sha256(text.encode()) for name, text in preprocessing.items()}
    return {WEIGHTS: weights_hash(model)} | {name: h.hexdigest() for name, h in hashes.items()}


def states_identity(model: Model, hashes: Mapping[str, str], dtype: torch.dtype) -> str:
    """Return a text that changes whenever the hidden states of an example may change.

    Args:
        model: the run config's table ``model``.
        hashes: the fingerprint of the base model, which does not cover settings without a tensor.
        dtype: the type of the model's matrix products.
    """
    settings = {name: value for name, value in vars(model).items() if name != "device"}
    versions = [code_hash(), *map(version, ("torch", "transformers", "timm"))]
    parts = [dict(hashes), settings, revision(model.name), str(dtype), versions]
    return json.dumps(parts, sort_keys=True)
