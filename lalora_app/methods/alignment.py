"""What a client does to its factors before it sends them: nothing, or a common rotation."""

import numpy as np

from lalora_app.adapter.factors import Adapter, factor_pairs


def keep_result(start: Adapter, result: Adapter) -> Adapter:
    """Send the factors as they are."""
    return result


def rotate_to_start(start: Adapter, result: Adapter) -> Adapter:
    """FedRot-LoRA: turn A towards the A that the round started from (arXiv:2602.23638).

    With A·A_startᵀ = USVᵀ and R = UVᵀ the factors become (BR, RᵀA): the product stays, and Rᵀ is
    the orthogonal matrix that brings A nearest to A_start, so that clients' factors can be
    averaged. Limit: rank 1 can only flip the sign.

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
