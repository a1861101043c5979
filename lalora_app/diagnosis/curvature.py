"""Sharpness of the loss at an adapter: the top eigenvalue of its Hessian, on public data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lalora_app.adapter.factors import kind
from lalora_app.blocks.adapters import wire_name
from lalora_app.data.encoding import Batch
from lalora_app.diagnosis.spectra import lanczos_top
from lalora_app.models.backbone import Backbone
from lalora_app.models.device import to_device
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.tape import unused_parameter_error

Named = Mapping[str, nn.Parameter]


def _own_tensors(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Return the factors and the head of the model's forward pass, by wire name.

    A method may train other tensors and compute these from them.
    """
    named = {wire_name(name): p for name, p in backbone.model.named_parameters()}
    trained = backbone.engine.parameters
    return {n: p for n, p in named.items() if kind(n) in ("A", "B") or n in trained}


@contextmanager
def _differentiable(tensors: Iterable[nn.Parameter]) -> Iterator[None]:
    """Require gradients of all tensors inside the block; restore the flags afterwards."""
    before = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        for tensor, _ in before:
            tensor.requires_grad_()
        yield
    finally:
        for tensor, flag in before:
            tensor.requires_grad_(flag)


@contextmanager
def _own_forwards(model: nn.Module) -> Iterator[None]:
    """Use the forward functions of torch and PEFT inside the block, without the engine.

    The engine's autograd functions and the fast attention kernels have no second derivative.
    """
    modules = [m for m in model.modules() if isinstance(vars(m).get("forward"), MethodType)]
    attached = [(module, vars(module).pop("forward")) for module in modules]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, forward in attached:
            module.forward = forward


@torch.no_grad()
def _require_same_logits(backbone: Backbone, batch: Batch) -> None:
    """Check that engine and layers compute the same logits, and so have the same Hessian.

    Raises:
        LayoutError: with the largest difference, if they do not.
    """
    expected = backbone.logits(batch)
    with _own_forwards(backbone.model):
        off = float((backbone.logits(batch) - expected).abs().max())
    bound = (5e-2 if backbone.dtype == torch.bfloat16 else 1e-4) * (1 + float(expected.abs().max()))
    if not off <= bound:  # also refuses NaN
        raise LayoutError(
            f"the layers' own logits are {off:.3g} off the engine's, and must be within {bound:.3g}"
        )


@torch.enable_grad()
def _batch_product(
    backbone: Backbone, batch: Batch, named: Named, direction: Sequence[Tensor]
) -> Tensor:
    """Return (size,): the Hessian of the batch's summed loss times ``direction``.

    It is the gradient of ⟨gradient, direction⟩ (Pearlmutter 1994): exact up to rounding.
    """
    labels = to_device(batch.labels, backbone.device)
    loss = backbone.task.losses(backbone.logits(batch), labels).sum()
    tensors = list(named.values())
    grads = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    slope = torch.zeros((), dtype=torch.float64, device=backbone.device)
    for name, grad, part in zip(named, grads, direction, strict=True):
        if grad is None:
            raise unused_parameter_error(name)
        slope = slope + (grad * part).sum(dtype=torch.float64)
    # A loss that is linear in a tensor has a zero second derivative there.
    products = torch.autograd.grad(slope, tensors, materialize_grads=True)
    return torch.cat([product.flatten() for product in products])


def _product(
    backbone: Backbone, batches: Sequence[Batch], named: Named, vector: np.ndarray
) -> np.ndarray:
    """Return (size,) in float64: the Hessian of the mean loss over all batches times ``vector``."""
    parts = torch.split(torch.from_numpy(vector), [p.numel() for p in named.values()])
    direction = [part.view(p.shape).to(p) for part, p in zip(parts, named.values(), strict=True)]
    total = np.zeros_like(vector)
    for batch in batches:
        total += _batch_product(backbone, batch, named, direction).double().cpu().numpy()
    return total / sum(len(batch.labels) for batch in batches)


def top_hessian_eigenvalue(
    backbone: Backbone, batches: Iterable[Batch], *, steps: int = 20, seed: int = 0
) -> float:
    """Return the largest eigenvalue of the Hessian of the mean loss at the current adapter.

    The Hessian covers all factors A, B and the head together, also tensors that do not train at
    the moment. Lanczos' iteration uses exact Hessian-vector products; their relative rounding error
    is about 1e-6 in float32 and 1e-2 under bf16 autocast. One product costs about three gradients
    of all batches and keeps the graph of one batch. Tensors, gradients, flags and the engine are
    restored bit for bit.

    Args:
        backbone: the model with the adapter loaded.
        batches: PUBLIC examples, at least one; all examples have equal weight.
        steps: number of Lanczos steps; the value grows with them towards the eigenvalue.
        seed: seed of the start vector.

    Returns:
        The eigenvalue, exact if ``steps`` is at least the number of entries; negative only if the
        loss curves down in every direction.

    Raises:
        ValueError: if there is no example, ``steps`` is below 1, or a derivative is not finite.
        LayoutError: if engine and layers compute different logits, or the loss does not depend on a
            tensor.

    Privacy: public data only. No noise is added and the ledger is not used: never call it with
        a client's own examples.
    """
    public = [batch for batch in batches if len(batch.labels)]
    if not public:
        raise ValueError("the Hessian over 0 examples: there must be at least 1")
    _require_same_logits(backbone, public[0])
    named = _own_tensors(backbone)
    size = sum(p.numel() for p in named.values())
    rng = np.random.default_rng(seed)
    with _differentiable(named.values()), _own_forwards(backbone.model):
        matvec = partial(_product, backbone, public, named)
        return lanczos_top(matvec, size, steps=steps, rng=rng)
