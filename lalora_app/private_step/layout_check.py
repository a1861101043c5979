"""Check before training that a model groups rows by example and never mixes examples."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.engine import Engine
from lalora_app.private_step.gradients import PerExampleGrads

Losses = Callable[[list[int]], Tensor]


def check_layout(engine: Engine, losses: Losses, examples: int) -> None:
    """Check that rows are grouped by example and that no layer mixes examples.

    Two checks are made, each for two numbers of examples. The gradient of one example's loss must
    be exactly 0 in the rows of all other examples, for every parameter. And an example's loss must
    not change if another example is left out of the batch; this finds mixing below the trained
    layers too. A second number of examples is tried because rows that belong to no example may
    divide evenly by the first.

    A zero factor makes the gradient of the other factor zero. So all parameters are replaced by
    random numbers during the check, and restored afterwards.

    Args:
        engine: the model's engine; all its parameters are active after the call.
        losses: function from indices of fixed inputs to their losses (indices,), in one forward
            pass.
        examples: number of inputs, at least 3.

    Raises:
        LayoutError: if a check fails; names the first parameter concerned.

    Privacy: use public or random inputs only.
    """
    rows = list(range(examples))
    engine.activate(frozenset(engine.parameters))
    kept = {name: p.detach().clone() for name, p in engine.parameters.items()}
    try:
        for parameter in engine.parameters.values():
            nn.init.normal_(parameter, std=0.1)
        for example in rows:
            _check_gradient_is_separate(engine, losses, rows, example)
        _check_gradient_is_separate(engine, losses, rows[1:], 0)
        _check_losses_are_independent(losses, rows)
    finally:
        _restore(engine, kept)


@torch.no_grad()
def _restore(engine: Engine, kept: dict[str, Tensor]) -> None:
    for name, parameter in engine.parameters.items():
        parameter.copy_(kept[name])


def _check_gradient_is_separate(
    engine: Engine, losses: Losses, rows: list[int], example: int
) -> None:
    grads = engine.gradients(partial(_one_loss, losses, rows, example), len(rows))
    _check_zero_in_other_rows(grads, example)


def _one_loss(losses: Losses, rows: list[int], example: int) -> Tensor:
    chosen = torch.arange(len(rows)) == example
    example_losses = losses(rows)
    return torch.where(
        chosen.to(example_losses.device), example_losses, torch.zeros_like(example_losses)
    )


@torch.no_grad()
def _check_losses_are_independent(losses: Losses, rows: list[int]) -> None:
    together = losses(rows)
    # Rounding errors are far smaller than this.
    tolerance = 1e-2 if together.dtype == torch.bfloat16 else 1e-3
    for fewer in (rows[1:], rows[:-1]):
        same = torch.allclose(losses(fewer), together[fewer], rtol=tolerance, atol=tolerance)
        if not same:
            raise LayoutError(
                "an example's loss depends on the others in its batch: a layer mixes examples, "
                "such as BatchNorm"
            )


def _check_zero_in_other_rows(grads: PerExampleGrads, example: int) -> None:
    for name, grad in grads.dense().items():
        norms = grad.flatten(1).norm(dim=1)  # (examples,)
        others = torch.cat([norms[:example], norms[example + 1 :]])
        if not bool(others.any()) and not bool(norms[example] > 0):
            raise LayoutError(
                f"{name}: its gradient is zero or not a number, whatever its value: frozen weights "
                "behind it may be zero"
            )
        if bool((others != 0).any()) or not bool(norms[example] > 0):
            raise LayoutError(
                f"{name}: the gradient of one example touches another's rows (rows not grouped by "
                "example, or a layer that mixes examples, such as BatchNorm)"
            )
