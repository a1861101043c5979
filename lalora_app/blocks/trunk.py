"""The whole model below its head: with a frozen trunk, a step needs the head's input alone."""

from collections.abc import Callable, Iterable
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn

from lalora_app.blocks.prefix import FrozenPart


def trained_whole(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a PEFT model that train whole, by path; a language model has none."""
    from peft.utils import ModulesToSaveWrapper

    return {path: m for path, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


def first_input(modules: Iterable[nn.Module], run: Callable[[], object]) -> Tensor:
    """Return the input of the first of some modules to compute in a forward pass.

    Args:
        modules: at least one of them computes.
        run: runs one forward pass of the model.
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.extend((*inputs, *named.values()))

    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return seen[0]


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the smallest module with all layers that train whole; None: it has adapted layers.

    Args:
        model: a PEFT model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    paths = [path.split(".") for path in trained_whole(model)]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    head = modules[".".join(names[0] for names in shared)]
    return None if any(isinstance(m, BaseTunerLayer) for m in head.modules()) else head


class Trunk(FrozenPart):
    """The model below its head, for a method that trains the head alone.

    Args:
        model: the PEFT model, whose factors give a product of zero.
        head: the module with all layers that train.
        identity: a text that changes whenever the output of the trunk may change.
    """

    def __init__(self, model: nn.Module, head: nn.Module, identity: str):
        super().__init__(identity, "head")
        self._model, self._head = cast(Any, model), head
        self._plain = False  # whether the model returns logits, and no object that has them

    def _states(self, run: Callable[[], object]) -> Tensor:
        """Return the input of the head; a model with one vector per example has one token."""
        watch = self._model.register_forward_hook(self._note_kind)
        try:
            states = first_input([self._head], run)
        finally:
            watch.remove()
        self.per_token = states.dim() > 2
        return states if self.per_token else states[:, None]  # (examples, 1, features)

    def _note_kind(self, _: nn.Module, inputs: object, output: object) -> None:
        self._plain = isinstance(output, Tensor)

    def _give(self, states: Tensor | None) -> None:
        if states is None:
            self._model.__dict__.pop("forward", None)
            return
        given = states if self.per_token else states[:, 0]

        def forward(*inputs: object, **named: object) -> Any:
            logits = self._head(given)
            return logits if self._plain else SimpleNamespace(logits=logits)

        self._model.forward = forward
