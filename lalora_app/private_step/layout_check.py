"""The proof at start-up that a model's rows are grouped by example and that none are mixed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.engine import Engine
from lalora_app.private_step.gradients import PerExampleGrads

Losses = Callable[[list[int]], Tensor]


def check_layout(engine: Engine, losses: Losses, examples: int) -> None:
    """Prove that rows are grouped by example and that no layer mixes examples (traps K, L).

    The loss of one example of a batch is differentiated: every other example's row must be exactly
    0 in every parameter. And an example's loss must stay the same when another one is left out,
    which also sees what is mixed below the trained layers. Factors at 0 hide their partner's
    gradient, so they are filled with random numbers for the check and restored. Run it on public
    or random inputs only.

    Args:
        engine: with all parameters of interest made active here, and left so.
        losses: indices of fixed inputs -> (indices,): the forward on just these.
        examples: how many inputs there are, at least 3.

    Raises:
        LayoutError: names the first parameter that sees another example.
    """
    rows = list(range(examples))
    engine.activate(frozenset(engine.parameters))
    kept = {name: p.detach().clone() for name, p in engine.parameters.items()}
    try:
        for parameter in engine.parameters.values():
            nn.init.normal_(parameter, std=0.1)
        for example in range(examples):
            grads = engine.gradients(partial(_one_loss, losses, rows, example), examples)
            _check_zero_in_other_rows(grads, example)
        _check_losses_are_independent(losses, rows)
    finally:
        _restore(engine, kept)


@torch.no_grad()
def _restore(engine: Engine, kept: dict[str, Tensor]) -> None:
    for name, parameter in engine.parameters.items():
        parameter.copy_(kept[name])


def _one_loss(losses: Losses, rows: list[int], example: int) -> Tensor:
    chosen = torch.arange(len(rows)) == example
    each = losses(rows)
    return torch.where(chosen.to(each.device), each, torch.zeros_like(each))


@torch.no_grad()
def _check_losses_are_independent(losses: Losses, rows: list[int]) -> None:
    together = losses(rows)
    tolerance = 1e-2 if together.dtype == torch.bfloat16 else 1e-3  # rounding moves far less
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
        if bool((others != 0).any()) or not bool(norms[example] > 0):
            raise LayoutError(
                f"{name}: the gradient of one example touches another's rows (rows not grouped by "
                "example, or a layer that mixes examples, such as BatchNorm)"
            )
