"""Losses and metrics of each kind of task."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lalora_app.data.encoding import IGNORED
from lalora_app.data.task_division import division_of
from lalora_app.settings.run_config import Config

Metrics = dict[str, float]
Losses = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> (examples,)

METRICS = ("accuracy", "balanced_accuracy", "perplexity")  # of all tasks


def scores_in_row(row: Mapping[str, Any]) -> Metrics:
    """Return the metrics in a row of the history."""
    return {name: row[name] for name in METRICS if name in row}


def format_scores(scores: Metrics, between: str = "  ") -> str:
    """Return metrics as text."""
    return between.join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())


@dataclass(frozen=True)
class Task:
    """Losses and metrics of logits.

    Attributes:
        losses: (logits, labels) -> (examples,): the loss of each example on its own.
        count: (logits, labels) -> counts that can be summed over batches.
        metrics: the sum of the counts -> ``accuracy`` and one more metric.
    """

    losses: Losses
    count: Callable[[Tensor, Tensor], np.ndarray]
    metrics: Callable[[np.ndarray], Metrics]


def mean_over_views(losses: Losses, logits: Tensor, labels: Tensor, views: int) -> Tensor:
    """Return (examples,): the loss of each example, the mean over its views.

    Limit: with one view the losses themselves.

    Args:
        losses: (logits, labels) -> the loss of each row.
        logits: (examples · views, ...), the views of an example side by side.
        labels: (examples, ...).
        views: number of views of each example.
    """
    if views == 1:
        return losses(logits, labels)
    each = losses(logits, labels.repeat_interleave(views, dim=0))  # (examples · views,)
    return each.reshape(-1, views).mean(1)


def _class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def _confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return (labels, predictions) counts."""
    counts = np.zeros((logits.shape[1],) * 2)
    np.add.at(counts, (labels.cpu().numpy(), logits.argmax(1).cpu().numpy()), 1)
    return counts


def accuracies(confusion: np.ndarray) -> Metrics:
    """Return accuracy and balanced accuracy of a (labels, predictions) count matrix."""
    totals = confusion.sum(1)
    recalls = np.diag(confusion)[totals > 0] / totals[totals > 0]
    accuracy = float(np.trace(confusion) / totals.sum())
    return {"accuracy": accuracy, "balanced_accuracy": float(recalls.mean())}


def _next_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (examples, vocabulary, tokens - 1) logits and the true next tokens."""
    return logits[:, :-1].transpose(1, 2), labels[:, 1:]


def _sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (examples,): the mean over a text's own next tokens; 0 for a text of one token."""
    given, wanted = _next_tokens(logits, labels)
    each = cross_entropy(given, wanted, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)


def _token_counts(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return summed loss, right predictions and number of next tokens."""
    given, wanted = _next_tokens(logits, labels)
    loss = cross_entropy(given, wanted, reduction="sum", ignore_index=IGNORED)
    right = (given.argmax(1) == wanted).sum()
    return np.array([float(loss), float(right), float((wanted != IGNORED).sum())])


def _token_metrics(counts: np.ndarray) -> Metrics:
    """Return the accuracy of the next token, and the perplexity."""
    loss, right, _ = counts / max(counts[2], 1)
    return {"accuracy": float(right), "perplexity": float(np.exp(loss))}


def within_tasks(task: Task, tasks: Sequence[int]) -> Task:
    """Return losses and metrics in which an example has only the classes of its own task.

    This is one head per task of a linear head: its rows are divided as the classes are, and the
    example's label says which of them compute.

    Args:
        task: losses and metrics over all classes.
        tasks: the task of each class.

    Limit: one task of all classes changes nothing.
    """
    of_class = torch.tensor(tasks)

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        places = of_class.to(labels.device)
        others = places[labels][:, None] != places  # (examples, classes)
        return logits.masked_fill(others, -math.inf)

    return Task(
        losses=lambda logits, labels: task.losses(own(logits, labels), labels),
        count=lambda logits, labels: task.count(own(logits, labels), labels),
        metrics=task.metrics,
    )


def task_of_run(task: Task, config: Config) -> Task:
    """Return a model's losses and metrics in a run: within tasks, for ``model.task-heads``."""
    return within_tasks(task, division_of(config).tasks) if config.model.task_heads else task


CLASSIFICATION = Task(_class_losses, _confusion, accuracies)


LANGUAGE_MODEL = Task(_sequence_losses, _token_counts, _token_metrics)
