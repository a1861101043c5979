"""What else than plain factors a method trains: gates, magnitudes of directions, projections.

Each has a ``start``, which adds its tensors to an initial adapter, and an ``effective``, which maps
them to the factors that the model computes with. Nothing here sees data.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lalora_app.adapter.factors import Adapter, factor_pairs, kind, sibling
from lalora_app.settings.run_config import MethodNumbers

T = TypeVar("T")


def _factors_and_heads(tensors: Mapping[str, T]) -> dict[str, T]:
    return {name: x for name, x in tensors.items() if kind(name) in ("A", "B", "head")}


def add_gates(start: Adapter, rule: MethodNumbers) -> Adapter:
    """BeamLoRA: add gates g (r,) at zero, where all directions count alike."""
    gates = {
        sibling(a, "gate"): np.zeros(len(start[a]), np.float32) for _, a in factor_pairs(start)
    }
    return start | gates


def gated_factors(theta: Mapping[str, Tensor], rule: MethodNumbers) -> dict[str, Tensor]:
    """BeamLoRA: A becomes r·softmax(g/τ) ∘ A, so ΔW = s·B·diag(r·softmax(g/τ))·A.

    τ is ``rule.gate-temperature`` (arXiv:2502.13604). Limit: rank 1 leaves A as it is.

    Privacy: gates are in the clip vector, and sent as factors are.
    """
    own = _factors_and_heads(theta)
    for _, a in factor_pairs(own):
        gate = theta[sibling(a, "gate")]
        shares = len(gate) * torch.softmax(gate / rule.gate_temperature, dim=0)
        own[a] = shares[:, None] * theta[a]
    return own


def rank_of_all_tasks(rank: int, rule: MethodNumbers) -> int:
    """SD-LoRA: return the rank that a model needs for the directions of every task."""
    return rank * rule.tasks


def fixed_b_name(b: str) -> str:
    """Return the name of a layer's frozen directions on the side of B."""
    return sibling(b, "fixed").replace(".lora_fixed.", ".lora_fixed.B.")


def add_task_directions(start: Adapter, rule: MethodNumbers) -> Adapter:
    """SD-LoRA: keep a first block as the factors, and make room for the tasks before.

    Frozen directions begin at zero, as do their magnitudes α (tasks − 1,).
    """
    extended = dict(start)
    for b, a in factor_pairs(start):
        rank = len(start[a]) // rule.tasks
        extended[a], extended[b] = start[a][:rank].copy(), start[b][:, :rank].copy()
        extended[sibling(a, "fixed")] = np.zeros_like(start[a][rank:])
        extended[fixed_b_name(b)] = np.zeros_like(start[b][:, rank:])
        extended[sibling(a, "gate")] = np.zeros(rule.tasks - 1, np.float32)
    return extended


def factors_with_task_directions(
    theta: Mapping[str, Tensor], rule: MethodNumbers
) -> dict[str, Tensor]:
    """SD-LoRA: ΔW = s·(B·A + Σ_i α_i·B̂_i·Â_i) over the tasks before (arXiv:2501.13198, eq. 4).

    The paper's own magnitude of the present task is left in B, which has it anyway.

    Privacy: magnitudes are in the clip vector; directions are made of noised factors.
    """
    own = _factors_and_heads(theta)
    for b, a in factor_pairs(own):
        rank, magnitudes = theta[a].shape[0], theta[sibling(a, "gate")]
        frozen = theta[fixed_b_name(b)] * magnitudes.repeat_interleave(
            rank
        )  # (m, rank·(tasks − 1))
        own[a] = torch.cat([theta[a], theta[sibling(a, "fixed")]])
        own[b] = torch.cat([theta[b], frozen], dim=1)
    return own


def rank_mask_name(b: str) -> str:
    """Return the name of a layer's mask of ranks; that of features is A's own ``fixed``."""
    return sibling(b, "fixed").replace(".lora_fixed.", ".lora_fixed.ranks.")


def add_masks(start: Adapter, rule: MethodNumbers) -> Adapter:
    """LoSA: add masks of input features (n,) and ranks (r,); ones, until a server calibrates."""
    masks = Adapter()
    for b, a in factor_pairs(start):
        masks[sibling(a, "fixed")] = np.ones(start[a].shape[1], np.float32)
        masks[rank_mask_name(b)] = np.ones(start[a].shape[0], np.float32)
    return start | masks


def masked_factors(theta: Mapping[str, Tensor], rule: MethodNumbers) -> dict[str, Tensor]:
    """LoSA: A becomes A ⊙ (ranks kept)·(features kept)ᵀ (arXiv:2502.14816).

    Privacy: masks are of public inputs; noise on what is masked never reaches the model.
    """
    own = _factors_and_heads(theta)
    for b, a in factor_pairs(own):
        own[a] = theta[rank_mask_name(b)][:, None] * theta[a] * theta[sibling(a, "fixed")]
    return own


def add_task_basis(start: Adapter, rule: MethodNumbers) -> Adapter:
    """DualLoRA: add room for a basis Φ (r·(tasks − 1), n) of what the tasks before have used."""
    room = {
        sibling(a, "fixed"): np.tile(np.zeros_like(start[a]), (rule.tasks - 1, 1))
        for _, a in factor_pairs(start)
    }
    return start | room


def split_rows_by_basis(a: Any, basis: Any) -> tuple[Any, Any]:
    """Return the first half of A's rows outside of the basis, and the others inside of it.

    ``a`` is (r, n), ``basis`` has orthonormal rows or zeros; arrays or tensors. An empty basis
    leaves all rows as they are.
    """
    half = a.shape[0] // 2
    inside = (a @ basis.T) @ basis
    return a[:half] - inside[:half], inside[half:] if bool((basis != 0).any()) else a[half:]


def projected_factors(theta: Mapping[str, Tensor], rule: MethodNumbers) -> dict[str, Tensor]:
    """DualLoRA: an orthogonal adapter outside of Φ, a residual one inside (arXiv:2411.00623).

    Its bases come from raw features, which are private; Φ here spans the noised updates of the
    tasks before. The test-time weight of the residual adapter needs features too, and is 1.

    Privacy: Φ is made of noised factors.
    """
    own = _factors_and_heads(theta)
    for _, a in factor_pairs(own):
        own[a] = torch.cat(split_rows_by_basis(theta[a], theta[sibling(a, "fixed")]))
    return own
