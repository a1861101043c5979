"""The checks of benchmarks/gpu_checks.py pass on a CPU, and see a wrong sum, noise or factor."""

import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_checks
import gpu_reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert():
    """The padded BERT of the checks."""
    ((name, row),) = gpu_reference.rows("bert")
    return name, row


def failed(report: gpu_checks.Report) -> set[str]:
    return {row["check"] for row in report.rows if row["ok"] is False}


def test_the_checks_of_sums_and_steps_pass_on_a_cpu(bert):
    report = gpu_checks.Report()
    gpu_checks.check_sums(report, CPU, *bert, ["fused"], ["float32"])
    gpu_checks.check_steps(report, CPU, *bert, ["fused"], ["float32"])
    assert [row["check"] for row in report.rows] == [
        *["clipped sum"] * 3,
        "one left out",
        "loss with one fewer",
        *["resting factor"] * 2,
    ]
    assert failed(report) == set()


def test_the_checks_see_a_sum_that_is_not_clipped(bert, monkeypatch):
    clipped_sum = gpu_reference.clipped_sum
    monkeypatch.setattr(gpu_reference, "clipped_sum", lambda grads, c: clipped_sum(grads, 2 * c))
    report = gpu_checks.Report()
    gpu_checks.check_sums(report, CPU, *bert, ["fused"], ["float32"])
    assert failed(report) == {"clipped sum", "one left out"}


def test_the_checks_see_a_factor_that_does_not_rest(bert, monkeypatch):
    def apply_to_all(backbone, optimizer, gradients):
        for parameter in backbone.engine.parameters.values():
            parameter.data.add_(1e-3)

    monkeypatch.setattr(gpu_reference, "apply", apply_to_all)
    report = gpu_checks.Report()
    gpu_checks.check_steps(report, CPU, *bert, ["fused"], ["float32"])
    assert failed(report) == {"resting factor"}


def test_an_exception_is_a_failed_check_and_the_next_one_runs():
    report = gpu_checks.Report()
    with report.failing("steps", {"model": "bert"}):
        raise ValueError("no such layer")
    report.add("later", True)
    error = {"check": "steps", "ok": False, "model": "bert", "error": "ValueError: no such layer"}
    assert report.rows == [error, {"check": "later", "ok": True}]
