"""The device and number type of the model: CUDA with bf16 autocast, or the CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lalora_app.adapter.whole_linear import whole_layers
from lalora_app.settings.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of ``model.device``; ``auto`` is the GPU where there is one.

    TF32 is off: float32 means float32, and bf16 autocast is the fast path of a GPU. cuDNN's
    attention is off: it plans anew for every (examples, tokens), and a Poisson batch nearly always
    has a new size (https://github.com/pytorch/pytorch/issues/155958).

    Args:
        name: "auto", "cpu", "cuda", or "cuda:N" for the GPU of number N.

    Raises:
        ConfigError: if there is no such GPU.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        allowed = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(gpus))])
        raise ConfigError(f'model.device="{name}" must be one of {allowed}: GPUs visible: {gpus}')
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the backbone's matrix products; ``auto`` is bf16 on CUDA."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if (auto if name == "auto" else name) == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context of a forward in ``dtype``."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen Linear layers in ``dtype``, so that autocast does not cast them every time.

    Limit: not where the whole weight trains, as W0 + W is computed and saved in float32.
    """
    kept = {id(layer.base_layer) for layer in whole_layers(model).values()}
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters())
        if type(module) is nn.Linear and frozen and id(module) not in kept:
            module.to(dtype)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
