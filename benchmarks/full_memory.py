"""Measure the memory of a private step of full fine-tuning against an ordinary one.

python benchmarks/full_memory.py                        # 64 texts of 32 tokens, MiniLM-L6-H384
python benchmarks/full_memory.py --tokens 128 --examples 64

Both train the same target weights and the head by SGD. The peak has the model's weights and all
tensors of one step: forward and backward pass, and in the private step norms, sum and noise.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from measure import peak_bytes
from models import Batch, Row, minilm
from one_step import LEARNING_RATE, NOISE_STD
from torch import Tensor, nn

from lalora_app.blocks.adapters import Targets, wire_name, with_whole_weights
from lalora_app.privacy.randomness import secure
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.mechanism import add_noise, clipped_sum

MIB = 2**20
HEAD = "classifier"
TARGETS = {
    "query, value": ("query", "value"),
    "all Linear layers": ("query", "key", "value", "dense"),
}


def _paths(base: nn.Module, names: tuple[str, ...]) -> list[str]:
    linear = [path for path, m in base.named_modules() if isinstance(m, nn.Linear)]
    return [path for path in linear if path.rpartition(".")[2] in names]


def _stepper(parameters: list[nn.Parameter], grads: Callable[[], list[Tensor]]) -> object:
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for parameter, grad in zip(parameters, grads(), strict=True):
            parameter.grad = grad
        optimizer.step()

    return step


def ordinary(base: nn.Module, row: Row, batch: Batch, paths: list[str]) -> int:
    """Return the peak bytes of an ordinary step: autograd's summed gradients."""
    model = copy.deepcopy(base).requires_grad_(False)
    for path in paths:
        model.get_submodule(path).weight.requires_grad_()
    model.get_submodule(HEAD).requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def grads() -> list[Tensor]:
        row.losses(model, batch).sum().backward()
        return [p.grad for p in parameters]

    return _bytes(model) + peak_bytes(_stepper(parameters, grads))


def private(base: nn.Module, row: Row, batch: Batch, paths: list[str]) -> int:
    """Return the peak bytes of a private step of the method ``full``."""
    targets = Targets(paths, paths)
    model = with_whole_weights(copy.deepcopy(base), targets, trained=[HEAD], task_type=None)
    named = {wire_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    engine, rng, size = KernelEngine(model, named, "plain"), secure(), len(batch["labels"])

    def grads() -> list[Tensor]:
        found = engine.gradients(lambda: row.losses(model, batch), size)
        sums = clipped_sum(found, 1.0)
        del found
        noised = add_noise(sums, noise_std=NOISE_STD, expected_batch=float(size), rng=rng)
        return [noised[name] for name in named]

    return _bytes(model) + peak_bytes(_stepper(list(named.values()), grads))


def _bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def main() -> None:
    """Print both peaks, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--examples", type=int, default=64)
    arguments = parser.parse_args()
    row = minilm(tokens=arguments.tokens)
    base = row.model.unload()
    batch = row.make_batch(arguments.examples, torch.device("cpu"))
    print(f"{arguments.examples} texts of {arguments.tokens} tokens, MiB: ordinary, private, ratio")
    for label, names in TARGETS.items():
        paths = _paths(base, names)
        one, other = (step(base, row, batch, paths) for step in (ordinary, private))
        print(f"{label:18s} {one / MIB:8.1f} {other / MIB:8.1f} {other / one:6.2f}")


if __name__ == "__main__":
    main()
