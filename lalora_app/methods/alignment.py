"""Transformations of a client's factors before the upload: none, or a rotation (FedRot-LoRA)."""

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs


def keep_result(start: Adapter, result: Adapter) -> Adapter:
    """Return the client's result unchanged."""
    return result


def rotate_to_start(start: Adapter, result: Adapter) -> Adapter:
    """FedRot-LoRA: rotate A towards the A at the start of the round (arXiv:2602.23638).

    With A·A_startᵀ = USVᵀ and R = UVᵀ, the factors become (BR, RᵀA). The product does not change.
    Rᵀ is the orthogonal matrix that minimises ‖RᵀA − A_start‖, so that the factors of different
    clients can be averaged. Limit: at rank 1 the rotation is a change of sign.

    Args:
        start: the adapter at the start of the round, with A (r, n) per layer.
        result: the client's adapter after its local steps; every layer has both factors.

    Privacy: post-processing of noised factors; no extra cost.
    """
    turned = dict(result)
    for b, a in factor_pairs(result):
        own, reference = result[a].astype(np.float64), start[a].astype(np.float64)
        u, _, vt = np.linalg.svd(own @ reference.T)
        rotation = u @ vt  # (r, r)
        turned[b] = (result[b] @ rotation).astype(np.float32)
        turned[a] = (rotation.T @ own).astype(np.float32)
    return turned
