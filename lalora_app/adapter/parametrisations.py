"""Extra tensors of a method and the map to LoRA factors: gates, magnitudes, masks, memory.

Each parametrisation is a pair of functions. ``add_…`` adds the extra tensors to an initial
adapter (``Method.start``). The other maps all tensors to the factors and heads of the model
(``Method.effective``). Neither reads data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs, kind, sibling
from lalora_app.settings.run_config import MethodNumbers

if TYPE_CHECKING:  # the table of methods is read in processes that do not compute
    from torch import Tensor

T = TypeVar("T")


def _factors_and_heads(theta: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors that the model has without a parametrisation."""
    return {name: x for name, x in theta.items() if kind(name) in ("A", "B", "head")}


def keep_head(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """Leave out all factors: only the head trains and travels, and B·A stays zero."""
    return {name: array for name, array in start.items() if kind(name) == "head"}


def add_gates(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """BeamLoRA: add zero gates g (r,), one per rank-one direction; all get equal weight."""
    gates = {
        sibling(a, "gate"): np.zeros(len(start[a]), np.float32) for _, a in factor_pairs(start)
    }
    return start | gates


def gated_factors(theta: Mapping[str, Tensor], numbers: MethodNumbers) -> dict[str, Tensor]:
    """BeamLoRA: A becomes r·softmax(g/τ) ∘ A, so ΔW = s·B·diag(r·softmax(g/τ))·A.

    τ is ``rule.gate-temperature`` (arXiv:2502.13604). Limit: rank 1 leaves A unchanged.

    Privacy: gates are clipped, noised and sent together with the factors.
    """
    import torch

    tensors = _factors_and_heads(theta)
    for _, a in factor_pairs(tensors):
        gate = theta[sibling(a, "gate")]
        shares = len(gate) * torch.softmax(gate / numbers.gate_temperature, dim=0)
        tensors[a] = shares[:, None] * theta[a]
    return tensors


def rank_of_all_tasks(rank: int, numbers: MethodNumbers) -> int:
    """SD-LoRA: return the rank of a model that holds one block of directions per task."""
    return rank * numbers.tasks


def rank_of_task(rank: int, task: int, numbers: MethodNumbers) -> int:
    """SD-LoRA: return the directions that a task (from 0) trains: ⌈r·decayᵗᵃˢᵏ⌉, at least 1.

    The decay is ``rule.task-rank-decay``. Limit: 1 gives every task the whole rank r.
    """
    return max(1, math.ceil(round(rank * numbers.task_rank_decay**task, 9)))


def fixed_b_name(b: str) -> str:
    """SD-LoRA: return the name of a layer's frozen columns of B, from the name of B."""
    return sibling(b, "fixed").replace(".lora_fixed.", ".lora_fixed.B.")


def add_task_directions(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """SD-LoRA: split the factors into one trained block and zero blocks of finished tasks.

    Frozen directions (the blocks of finished tasks) and their magnitudes α (tasks − 1,) are zero
    at the start.
    """
    extended = dict(start)
    for b, a in factor_pairs(start):
        rank = len(start[a]) // numbers.tasks
        extended[a], extended[b] = start[a][:rank].copy(), start[b][:, :rank].copy()
        extended[sibling(a, "fixed")] = np.zeros_like(start[a][rank:])
        extended[fixed_b_name(b)] = np.zeros_like(start[b][:, rank:])
        extended[sibling(a, "gate")] = np.zeros(numbers.tasks - 1, np.float32)
        if numbers.task_rank_decay < 1:
            extended[rank_mask_name(b)] = np.ones(rank, np.float32)  # of the first task
    return extended


def factors_with_task_directions(
    theta: Mapping[str, Tensor], numbers: MethodNumbers
) -> dict[str, Tensor]:
    """SD-LoRA: ΔW = s·(B·A + Σ_i α_i·B̂_i·Â_i) over finished tasks i (arXiv:2501.13198, eq. 4).

    The paper trains a magnitude for the present task too; here B includes it.

    Privacy: magnitudes are clipped and noised with the factors; frozen directions are computed
    from noised factors.
    """
    import torch

    tensors = _factors_and_heads(theta)
    for b, a in factor_pairs(tensors):
        rank, magnitudes = theta[a].shape[0], theta[sibling(a, "gate")]
        mask = theta.get(rank_mask_name(b))  # noise outside of it has no effect on the model
        own = theta[a] if mask is None else mask[:, None] * theta[a]
        frozen = theta[fixed_b_name(b)] * magnitudes.repeat_interleave(
            rank
        )  # (m, rank·(tasks − 1))
        tensors[a] = torch.cat([own, theta[sibling(a, "fixed")]])
        tensors[b] = torch.cat([theta[b], frozen], dim=1)
    return tensors


def rank_mask_name(b: str) -> str:
    """LoSA, SD-LoRA: return the name of a layer's mask of directions, from the name of B.

    LoSA's mask of input features is named ``sibling(a, "fixed")``.
    """
    return sibling(b, "fixed").replace(".lora_fixed.", ".lora_fixed.ranks.")


def add_masks(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """LoSA: add masks of input features (n,) and ranks (r,), all ones.

    The server replaces them before the first round (``Method.calibrates``).
    """
    masks = Adapter()
    for b, a in factor_pairs(start):
        masks[sibling(a, "fixed")] = np.ones(start[a].shape[1], np.float32)
        masks[rank_mask_name(b)] = np.ones(start[a].shape[0], np.float32)
    return start | masks


def masked_factors(theta: Mapping[str, Tensor], numbers: MethodNumbers) -> dict[str, Tensor]:
    """LoSA: A becomes A ⊙ (rank mask)·(feature mask)ᵀ (arXiv:2502.14816).

    Privacy: masks are computed from public inputs. Noise on masked entries has no effect on the
    model.
    """
    tensors = _factors_and_heads(theta)
    for b, a in factor_pairs(tensors):
        tensors[a] = theta[rank_mask_name(b)][:, None] * theta[a] * theta[sibling(a, "fixed")]
    return tensors


def add_task_basis(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """DualLoRA: add zeros for Φ (r·(tasks − 1), n), a basis of the rows used by finished tasks."""
    bases = {
        sibling(a, "fixed"): np.tile(np.zeros_like(start[a]), (numbers.tasks - 1, 1))
        for _, a in factor_pairs(start)
    }
    return start | bases


def change_name(name: str) -> str:
    """DP-FedAdamW: return the name of the last global change of a tensor, from its name."""
    return f"change.lora_fixed.{name}"


def moment_name(name: str) -> str:
    """DP-FedAdamW: return the name of the mean second moment of a tensor, from its name."""
    return f"square.lora_moment.{name}"


def add_memory(start: Adapter, numbers: MethodNumbers) -> Adapter:
    """DP-FedAdamW: add to each tensor its last global change and (1,) its mean second moment.

    Both are zero before the first round: nothing is known. They are no tensors of the model.
    """
    changes = {change_name(name): np.zeros_like(array) for name, array in start.items()}
    return start | changes | {moment_name(name): np.zeros(1, np.float32) for name in start}


def split_rows_by_basis(a: Any, basis: Any) -> tuple[Any, Any]:
    """Project the first half of A's rows out of the basis, and the other half onto it.

    Args:
        a: the factor A (r, n), array or tensor.
        basis: rows (k, n) of the same type, orthonormal or zero.

    Returns:
        (first half minus its projection, projection of the second half). Limit: a basis of zeros
        leaves all rows unchanged.
    """
    half = a.shape[0] // 2
    inside = (a @ basis.T) @ basis
    return a[:half] - inside[:half], inside[half:] if bool((basis != 0).any()) else a[half:]


def projected_factors(theta: Mapping[str, Tensor], numbers: MethodNumbers) -> dict[str, Tensor]:
    """DualLoRA: half of A's rows orthogonal to Φ, the other half inside Φ (arXiv:2411.00623).

    The paper computes Φ from raw features, which are private. Here Φ spans the noised updates of
    finished tasks. The paper's test-time weight of the second half needs raw features as well; it
    is 1 here.

    Privacy: Φ is computed from noised factors.
    """
    import torch

    tensors = _factors_and_heads(theta)
    for _, a in factor_pairs(tensors):
        tensors[a] = torch.cat(split_rows_by_basis(theta[a], theta[sibling(a, "fixed")]))
    return tensors
