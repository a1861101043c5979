"""Statistical checks of noise."""

import numpy as np
import torch
from scipy import stats


def assert_gaussian(samples: np.ndarray, std: float) -> None:
    """Accept the right standard deviation, and have the power to reject 2/3 and 3/2 of it."""
    assert stats.kstest(samples, stats.norm(scale=std).cdf).pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(samples, stats.norm(scale=wrong * std).cdf).pvalue < 1e-6


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors.values()])
