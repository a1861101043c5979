"""Find the stack of equal blocks of a model: those that compute one after the other.

The names of such stacks differ (``encoder.layer``, ``h``, ``blocks``), so a stack is found by what
its blocks do in a forward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[int, torch.Size | None, torch.Size | None]  # block, shapes of its input and output


@dataclass(frozen=True)
class Stack:
    """The equal blocks of a model, in the order of their computation.

    Attributes:
        path: the path of the list of blocks in the model.
        blocks: the modules of the list.
    """

    path: str
    blocks: tuple[nn.Module, ...]

    def block_of(self, path: str) -> int | None:
        """Return the number of the block, from 0, that a module lies in; None: in no block."""
        start = f"{self.path}."
        return int(path[len(start) :].split(".")[0]) if path.startswith(start) else None


def hidden_states(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states among the arguments of a block; None if it has none."""
    found = arguments[0] if arguments else named.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def output_states(output: Any) -> Tensor | None:
    """Return the hidden states in the output of a block; None if it has none."""
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) else None


def _has_linear_layers(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in block.modules() if module is not block)


def _lists_of_equal_modules(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Return the lists of modules of one type, each with Linear layers inside, by path."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = tuple(module.children())
        one_type = len({type(child) for child in children}) == 1
        if one_type and all(map(_has_linear_layers, children)):
            found[path] = children
    return found


def _calls(
    lists: Mapping[str, tuple[nn.Module, ...]], run: Callable[[], object]
) -> dict[str, list[Call]]:
    """Return the calls of the modules of every list, in their order."""
    calls: dict[str, list[Call]] = {path: [] for path in lists}

    def hook(path: str, index: int) -> Any:
        def record(_: Any, arguments: Any, named: Any, output: Any) -> None:
            states = hidden_states(arguments, named), output_states(output)
            given, returned = (None if s is None else s.shape for s in states)
            calls[path].append((index, given, returned))

        return record

    hooks = [
        child.register_forward_hook(hook(path, index), with_kwargs=True)
        for path, children in lists.items()
        for index, child in enumerate(children)
    ]
    try:
        # With gradients: without them, some modules of torch compute without calling their layers.
        with torch.enable_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def _is_stack(calls: list[Call], blocks: int) -> bool:
    """Tell whether every block computes once, in order, and keeps the shape of its input."""
    in_order = [index for index, _, _ in calls] == list(range(blocks))
    shapes = {shape for _, *both in calls for shape in both}
    return in_order and len(shapes) == 1 and None not in shapes


def find_stack(model: nn.Module, run: Callable[[], object]) -> Stack | None:
    """Return the only stack of equal blocks of a model; None: it has none or several.

    The blocks of a stack are of one type. Each computes once, in order, and returns hidden states
    of the shape that it receives. Lists inside the blocks do not count. Swin and ConvNeXt (several
    stages), encoder-decoders (two stacks) and ALBERT (one block, called several times) have none.

    Args:
        model: the model.
        run: runs one forward pass of the model.

    Privacy: use random inputs; no data is involved.
    """
    lists = _lists_of_equal_modules(model)
    calls = _calls(lists, run)
    stacks = [path for path, blocks in lists.items() if _is_stack(calls[path], len(blocks))]
    outer = [p for p in stacks if not any(p.startswith(f"{other}.") for other in stacks)]
    return Stack(outer[0], lists[outer[0]]) if len(outer) == 1 else None
