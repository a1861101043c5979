"""The checks of benchmarks/gpu.py pass on a CPU, and see a wrong sum, noise or factor."""

import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_parts import correctness, reference

BERT, CPU = ("bert, padded", "float32", "fused"), torch.device("cpu")


def failed(rows: list[dict]) -> set[str]:
    return {row["check"] for row in rows if row["ok"] is False}


def test_the_checks_of_sums_and_steps_pass_on_a_cpu():
    rows = [*correctness.check_sums(*BERT, CPU), *correctness.check_steps(*BERT, "adamw", CPU)]
    assert [row["check"] for row in rows] == [
        *["clipped sum"] * 3,
        "one left out",
        "loss with one fewer",
        "resting factor",
        "no wait",
    ]
    assert failed(rows) == set()


def test_the_checks_see_a_sum_that_is_not_clipped(monkeypatch):
    clipped_sum = reference.clipped_sum
    monkeypatch.setattr(reference, "clipped_sum", lambda grads, c: clipped_sum(grads, 2 * c))
    rows = list(correctness.check_sums(*BERT, CPU))
    assert failed(rows) == {"clipped sum", "one left out"}


def test_the_checks_see_a_factor_that_does_not_rest(monkeypatch):
    def apply_to_all(backbone, optimizer, gradients):
        for parameter in backbone.engine.parameters.values():
            parameter.data.add_(1e-3)

    monkeypatch.setattr(reference, "apply", apply_to_all)
    assert failed(list(correctness.check_steps(*BERT, "sgd", CPU))) == {"resting factor"}


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_checks_see_noise_of_another_size(factor, monkeypatch):
    add_noise = correctness.add_noise

    def scaled(sums, *, noise_std, **others):
        return add_noise(sums, noise_std=factor * noise_std, **others)

    monkeypatch.setattr(correctness, "add_noise", scaled)
    assert failed(list(correctness.check_noise(CPU))) == {"noise"}


def test_the_checks_see_two_equal_releases(monkeypatch):
    monkeypatch.setattr(correctness, "secure", lambda: reference.seeded(1, "n"))
    assert failed(list(correctness.check_noise(CPU))) == {"noise, independent"}
