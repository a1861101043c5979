"""Measure what a run has forgotten: linear probes of a second public task before and after it.

The probe replaces the run's own head, so the second task may have other classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lalora_app.adapter.factors import Adapter
from lalora_app.blocks.trunk import first_input, trained_whole
from lalora_app.data.encoding import Encoded
from lalora_app.data.examples import Examples, split, with_classes
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.forwards import masked_mean
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE
from lalora_app.settings.run_config import OPEN, Config, Data, Scalar, flatten, parse

EXAMPLES = 2000  # at most, of either split
_BATCH = 64
Sides = tuple[Examples, Examples]  # of training and of test
_DEFAULTS: dict[str, Scalar] = {
    **OPEN,
    "data.subset": NONE,
    "data.test-split": NONE,
    "data.partitioner": "iid",
    "data.tasks": 1,
    "data.task-order": "listed",
    "data.task-column": NONE,
    "model.task-heads": False,
}
_PENALTY = 1e-3  # of the probe, relative to the mean square of a feature


@dataclass(frozen=True)
class Forgetting:
    """Accuracy of linear probes on a second task, in [0, 1].

    Attributes:
        before: of the features of the base model.
        after: of the features of the trained model.
    """

    before: float
    after: float


def probe_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Return the test accuracy of a linear classifier by penalised least squares.

    W = argmin ‖X W - Y‖² + λ n ‖W‖², X with centred features, Y one column of 0 and 1 per class.

    Args:
        train: (n, features).
        train_labels: (n,) whole numbers from 0.
        test: (m, features).
        test_labels: (m,).

    Limit: features that are all equal give the most frequent class.

    Privacy: public examples only.
    """
    mean = train.mean(0)
    x, classes = np.asarray(train - mean, dtype=np.float64), int(train_labels.max()) + 1
    y = np.eye(classes)[train_labels]  # (n, classes)
    penalty = _PENALTY * len(x) * max(float(np.square(x).mean()), np.finfo(np.float64).tiny)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    scores = np.asarray(test - mean, dtype=np.float64) @ weights + y.mean(0)
    return float(np.mean(scores.argmax(1) == test_labels))


@torch.no_grad()
def features(model: Backbone, data: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Return (examples, features) in float64, the input of the head, and (examples,) the labels.

    The head begins at the first module that trains whole. An input with tokens is averaged.

    Raises:
        ConfigError: if no module of the model trains whole.
    """
    heads = trained_whole(model.model).values()
    if not heads:
        raise ConfigError("--second-task must be left out: no module of the model trains whole")
    rows, labels = [], []
    for batch in data.batches(_BATCH):  # in another order than the data
        states = first_input(heads, partial(model.logits, batch))
        rows.append(states if states.dim() == 2 else masked_mean(states, batch.mask))
        labels.append(batch.labels)
    return torch.cat(rows).double().numpy(), torch.cat(labels).numpy()


def _some(examples: Examples) -> Examples:
    """Return examples drawn at random, the same in every call, in the order of the data."""
    drawn = np.random.default_rng(0).permutation(len(examples))[:EXAMPLES]
    return examples.take(sorted(drawn.tolist()))


def second_data(config: Config, keys: Mapping[str, Any]) -> Data:
    """Return the table ``data`` of a second task: the run's keys, with others in their place.

    Keys of the run's own classes, tasks and clients get their defaults.

    Args:
        config: the run's config.
        keys: flat keys and values of the table ``data``, ``data.name`` among them.

    Raises:
        ConfigError: naming a key that is missing, unknown or of another table; or if the run trains
            a language model.
    """
    if config.model.task == "causal-lm":
        raise ConfigError(
            '--second-task must be left out for model.task="causal-lm": it has no classes to probe'
        )
    if "data.name" not in keys:
        raise ConfigError("--second-task must name the dataset: data.name")
    if other := [key for key in keys if not key.startswith("data.")]:
        key = other[0]
        raise ConfigError(f"--second-task {key}={keys[key]!r} must be a key of the table data")
    try:
        return parse({**flatten(config), **_DEFAULTS, **keys}).data
    except ConfigError as error:
        raise ConfigError(f"--second-task {error}") from error


def second_task(data: Data) -> Sides:
    """Return at most 2,000 examples of the training and of the test split of a second task.

    Raises:
        ConfigError: if the dataset cannot be read.
    """
    try:
        train, test = split(with_classes(data))
    except ConfigError as error:
        raise ConfigError(f"--second-task {error}") from error
    return _some(train), _some(test)


def forgetting(config: Config, model: Backbone, drift: Adapter, second: Sides) -> Forgetting:
    """Return the accuracy of probes on a second task, before and after the run's training.

    Args:
        config: the run's config.
        model: the run's trained model; it has its weights again afterwards.
        drift: the run's change of the base weights.
        second: training and test examples of the second task.

    Raises:
        ConfigError: if no module of the model trains whole.

    Privacy: the second task is public; no private data is involved.
    """
    sides = [model.encode(side) for side in second]

    def accuracy() -> float:
        return probe_accuracy(*features(model, sides[0]), *features(model, sides[1]))

    after, trained = accuracy(), model.adapter()
    _, start = build(config)  # B·A and W are zero
    model.load(start)
    before = accuracy()
    model.load(trained, drift)
    return Forgetting(before, after)
