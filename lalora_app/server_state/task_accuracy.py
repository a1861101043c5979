"""Accuracy by task over a run: the matrix, average accuracy, forgetting and backward transfer."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

KEY = "task_accuracy"  # of a row of the history: accuracy on each task so far, at a task's end
Matrix = Sequence[Sequence[float]]  # row i: after task i, the accuracy on tasks 0 to i


def matrix_of(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the accuracy matrix in the rows of a history; empty without tasks."""
    return [list(row[KEY]) for row in rows if KEY in row]


def average_accuracy(matrix: Matrix) -> float:
    """Return the mean accuracy on all tasks at the end: Σ_j a[T, j] / T."""
    return fmean(matrix[-1])


def forgetting(matrix: Matrix) -> float:
    """Return the mean loss of earlier tasks: Σ_{j<T} (max_{i<T} a[i, j] − a[T, j]) / (T − 1).

    The maximum is over the ends of the tasks from j on (arXiv:1801.10112). Limit: one task gives 0.
    """
    last = len(matrix) - 1
    best = [max(row[j] for row in matrix[j:last]) for j in range(last)]
    return fmean(b - end for b, end in zip(best, matrix[-1], strict=False)) if last else 0.0


def backward_transfer(matrix: Matrix) -> float:
    """Return the mean change of earlier tasks: Σ_{j<T} (a[T, j] − a[j, j]) / (T − 1).

    Negative values are losses (arXiv:1706.08840). Limit: one task gives 0.
    """
    last = len(matrix) - 1
    return fmean(matrix[-1][j] - matrix[j][j] for j in range(last)) if last else 0.0


def task_summary(rows: Sequence[Mapping[str, Any]], tasks: int) -> dict[str, Any]:
    """Return the entries of a run's summary on its tasks.

    Limits: none without tasks; only the matrix of a run that ended before its last task.
    """
    matrix = matrix_of(rows)
    if len(matrix) < tasks or not matrix:
        return {KEY: matrix} if matrix else {}
    return {
        KEY: matrix,
        "average_accuracy": average_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
    }
