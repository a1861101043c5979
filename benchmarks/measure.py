"""Reproducible counts of one training step: FLOPs, kernels, calls and bytes."""

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten
Step = Callable[[], Any]
Shape = tuple[int, ...]


def _addmm(into: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _mm(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _baddbmm(into: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return left[0] * _mm(left[1:], right[1:])


def _bmm(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return left[0] * _mm(left[1:], right[1:])


def _mv(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _addmv(into: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(left: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0]


def _sdpa(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(g: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 5 * sdpa_flop_count(query, key, value) // 2  # five products where the forward has two


# Operations of the measured kernels that torch's FLOP registry does not contain.
_PRODUCTS = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.addmm_: _addmm,
    aten.bmm: _bmm,
    aten.baddbmm: _baddbmm,
    aten.baddbmm_: _baddbmm,
    aten.mv: _mv,
    aten.addmv: _addmv,
    aten.addmv_: _addmv,
    aten.dot: _dot,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def flops(step: Step) -> int:
    """Return the floating-point operations of the step's matrix products and attention."""
    with FlopCounterMode(display=False, custom_mapping=_PRODUCTS) as counter:
        step()
    return int(counter.get_total_flops())


_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_NO_WORK |= {"_unsafe_view", "alias", "detach", "lift_fresh"}
_NO_WORK |= {"promote_types", "_record_function_enter_new", "_record_function_exit"}


def _is_view(function: Any) -> bool:
    infos = [result.alias_info for result in function._schema.returns]
    returns_view = any(info is not None and not info.is_write for info in infos)
    return (
        returns_view or torch.Tag.inplace_view in function.tags
    )  # in-place views, such as squeeze_


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in _NO_WORK and not _is_view(func):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernel_names(step: Step) -> list[str]:
    """Return the ATen calls of the step, in order, without views and bare allocations."""
    with _Kernels() as mode:
        step()
    return mode.names


def kernels(step: Step) -> int:
    """Return the number of ATen calls that are not views; a ``_foreach`` call counts as one."""
    return len(kernel_names(step))


def _storages(leaves: Iterable[Any]) -> dict[int, Any]:
    found = (leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}


def saved_bytes(step: Step, model: nn.Module) -> int:
    """Return the bytes that autograd saves for the backward, without parameters and buffers."""
    known = _storages(chain(model.parameters(), model.buffers()))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


class _Peak(TorchDispatchMode):
    """Track every storage that an ATen call allocates, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, Any] = {}

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        self._live.pop(key, None)

    def _follow(self, key: int, storage: Any) -> None:
        size = storage.nbytes()
        self._live[key] = weakref.finalize(storage, self._freed, key, size)
        self._live[key].atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages(tree_leaves((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(tree_leaves(result)).items():
            if key not in given and key not in self._live:
                self._follow(key, storage)
        return result


def peak_bytes(step: Step, device: torch.device | None = None) -> int:
    """Return the peak memory of the step's own tensors, in bytes."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Peak() as mode:
        step()
    return mode.peak


def calls(step: Step, model: nn.Module) -> tuple[int, int]:
    """Return the number of forward passes of the model and of backward passes of autograd."""
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    backward, grad = torch.autograd.backward, torch.autograd.grad
    with (
        patch("torch.autograd.backward", side_effect=backward) as backwards,
        patch("torch.autograd.grad", side_effect=grad) as grads,
    ):
        step()
    hook.remove()
    return len(forwards), backwards.call_count + grads.call_count
