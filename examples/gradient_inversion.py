"""Reconstruct a training image from an uploaded LoRA factor, without and with privacy.

python examples/gradient_inversion.py [docs/images/gradient-inversion.png]

A linear layer with a LoRA adapter trains on one image and takes one local step on factor A.
``∇A = s·Bᵀ·g·xᵀ`` has rank one, so every row of the uploaded change is a multiple of the input x:
its first singular vector is the image, up to sign and scale. The same step is run with the
package's clipping and noise for comparison. The image is matplotlib's sample portrait of Grace
Hopper (a work of the US government, in the public domain).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.privacy.randomness import secure
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.mechanism import add_noise, clipped_sum

SIDE, RANK, LABELS = 64, 8, 10
CLIP_NORM, LEARNING_RATE, DELTA = 0.5, 2.0, 1e-5
EPSILONS = (100.0, 8.0, 3.0)
EXPECTED_BATCH = 1.0  # best case of the attacker: a client with one example


def image() -> np.ndarray:
    """Return the grey image, (SIDE, SIDE), values from 0 to 1."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file:
        picture = Image.open(file).convert("L").crop((130, 40, 390, 300)).resize((SIDE, SIDE))
    return np.asarray(picture, dtype=np.float32) / 255


def adapted_layer() -> tuple[nn.Module, KernelEngine]:
    """Return a PEFT linear layer with nonzero B, as after the first round, and its engine."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE * SIDE, LABELS))
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    inject_adapter_in_model(settings, model)
    weights = {n: p for n, p in model.named_parameters() if "lora_" in n}
    nn.init.normal_(next(p for n, p in weights.items() if "lora_B" in n), std=0.1)
    engine = KernelEngine(model, weights)
    engine.activate(frozenset(n for n in weights if "lora_A" in n))
    return model, engine


def uploaded(x: np.ndarray, noise_multiplier: float) -> np.ndarray:
    """Return the change of A, (RANK, SIDE²), that a client with this one example uploads."""
    model, engine = adapted_layer()
    inputs = torch.from_numpy(x.reshape(1, -1))
    target = torch.zeros(1, dtype=torch.long)
    loss = nn.CrossEntropyLoss(reduction="none")
    grads = engine.gradients(lambda: loss(model(inputs), target), 1)
    clip_norm = CLIP_NORM if noise_multiplier > 0 else float("inf")
    noised = add_noise(
        clipped_sum(grads, clip_norm),
        noise_std=noise_multiplier * CLIP_NORM,
        expected_batch=EXPECTED_BATCH,
        rng=secure(),
    )
    return -LEARNING_RATE * next(iter(noised.values())).numpy()


def reconstructed(change: np.ndarray) -> np.ndarray:
    """Return the first right singular vector of the change as an image, values from 0 to 1."""
    first = np.linalg.svd(change, full_matrices=False)[2][0]
    picture = (first * np.sign(first.sum())).reshape(SIDE, SIDE)
    low, high = np.quantile(picture, [0.01, 0.99])
    return np.clip((picture - low) / (high - low), 0, 1)


def likeness(x: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation between the pixels of two images."""
    return float(np.corrcoef(x.ravel(), other.ravel())[0, 1])


def panels() -> list[tuple[str, np.ndarray, float]]:
    """Return (title, image, correlation with the true image) of every case."""
    x = image()
    found = [("the client's example", x, 1.0)]
    plain = reconstructed(uploaded(x, 0.0))
    found.append(("from A, without privacy", plain, likeness(x, plain)))
    for promise in EPSILONS:
        noise = calibrate(promise, DELTA, sampling_rate=1.0, steps=1)
        picture = reconstructed(uploaded(x, noise))
        spent = epsilon([Release(1.0, noise, 1)], DELTA)
        found.append((f"from A, at ε = {spent:.1f}", picture, likeness(x, picture)))
    return found


def draw(found: list[tuple[str, np.ndarray, float]], path: Path) -> None:
    """Write the images side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(2.2 * len(found), 2.7))
    for axis, (title, picture, likeness_) in zip(axes, found, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{title}\ncorrelation {likeness_:.2f}", fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    """Print the correlations; draw the images if a path is given."""
    found = panels()
    for title, _, value in found:
        print(f"{title}: correlation {value:.3f}")
    if len(sys.argv) > 1:
        draw(found, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
