"""Datasets: found, checked, split by content, dealt to simulated clients, cut into batches."""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalora_app.config import ConfigError, Data, full_path

DEMO = "demo:sms-spam"
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class DataError(ConfigError):
    """The data cannot be trained on; ``key`` is what a refusal may tell, without any value."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}{message}")
        self.key = key


@dataclass(frozen=True)
class Examples:
    """Labelled texts."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Batch:
    """Padded token ids (examples, tokens), their mask of the same shape, labels (examples,)."""

    inputs: Tensor
    mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids, ready to be batched."""

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return the given examples, padded to the longest of them."""
        rows = [torch.tensor(self.tokens[i]) for i in indices]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        return Batch(inputs, mask, torch.tensor([self.labels[i] for i in indices]))

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield every example once, by length, so that little is padded."""
        yield from self.micro_batches(range(len(self)), size)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[Batch]:
        """Yield the given examples in parts of at most ``size``, by length."""
        order = sorted(indices, key=lambda i: len(self.tokens[i]))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


def _read_demo() -> list[dict[str, Any]]:
    text = resources.files("lalora_app").joinpath("assets/sms_spam.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _read_file(key: str, path: Path) -> list[dict[str, Any]]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    if path.suffix not in _FORMATS or not path.is_file():
        known = ", ".join(_FORMATS)
        raise DataError(key, f'="{path}" must be an existing file ending in one of {known}')
    kind = _FORMATS[path.suffix]
    try:  # the library's copy of private data goes with the folder
        with tempfile.TemporaryDirectory() as cache:
            table = load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
            return [dict(row) for row in table]
    except Exception as error:  # the readers raise many kinds; all mean the same here
        raise DataError(key, f'="{path}" cannot be read as {path.suffix}') from error


def _read_hub(key: str, name: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(name, split="train")]
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        reason = str(error).splitlines()[0]
        raise DataError(key, f'="{name}" cannot be loaded from the hub: {reason}') from error


def _rows(key: str, name: str) -> list[dict[str, Any]]:
    if name == DEMO:
        return _read_demo()
    if name.startswith(("/", "~", ".")):
        return _read_file(key, full_path(name))
    return _read_hub(key, name)


def _column(rows: list[dict[str, Any]], key: str, column: str) -> list[Any]:
    if column not in rows[0]:
        found = ", ".join(rows[0])
        raise DataError(key, f'="{column}" must be a column of the data, which has {found}')
    return [row[column] for row in rows]


def _checked(rows: list[dict[str, Any]], name: str, data: Data) -> Examples:
    if not rows:
        raise DataError("data.name", f'="{name}" must hold at least one example')
    texts = _column(rows, "data.text-column", data.text_column)
    labels = _column(rows, "data.label-column", data.label_column)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise DataError("data.text-column", f'="{data.text_column}": row {row} has no text')
        if type(label) is not int or not 0 <= label < data.num_labels:
            raise DataError(
                "data.num-labels",
                f"={data.num_labels}: row {row} has label {label!r}, which must be an integer "
                f"from 0 to {data.num_labels - 1}",
            )
    return Examples(tuple(texts), tuple(labels))


def is_test(text: str, fraction: float) -> bool:
    """Tell from its content whether a text is in the test split: copies stay on one side."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@lru_cache(maxsize=4)
def split(data: Data) -> tuple[Examples, Examples]:
    """Return (train, test) of the run's dataset.

    Raises:
        DataError: if it is missing, lacks a column, or has a label outside the head.
    """
    examples = _checked(_rows("data.name", data.name), data.name, data)
    sides: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(examples.texts):
        sides[is_test(text, data.test_fraction)].append(i)
    if not all(sides):
        raise DataError("data.test-fraction", f"={data.test_fraction} leaves a side empty")
    return _take(examples, sides[0]), _take(examples, sides[1])


def _take(examples: Examples, rows: Sequence[int]) -> Examples:
    texts, labels = examples.texts, examples.labels
    return Examples(tuple(texts[i] for i in rows), tuple(labels[i] for i in rows))


def private_file(path: str, data: Data) -> Examples:
    """Return the examples of a real client's own file (``data-path`` of its node config)."""
    return _checked(_read_file("data-path", full_path(path)), path, data)


@lru_cache(maxsize=8)
def partition(data: Data, seed: int, clients: int) -> tuple[Examples, ...]:
    """Deal the training examples to simulated clients by flwr-datasets.

    Args:
        data: ``dirichlet-alpha`` sets the label skew; inf deals independently of labels.
        seed: of the deal.
        clients: their number; a client may come out empty.
    """
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    train, _ = split(data)
    table = Dataset.from_dict({"row": list(range(len(train))), "label": list(train.labels)})
    if math.isinf(data.dirichlet_alpha):
        dealer: Any = IidPartitioner(num_partitions=clients)
        table = table.shuffle(seed=seed)
    else:
        dealer = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=data.dirichlet_alpha,
            min_partition_size=0,
            self_balancing=False,
            seed=seed,
        )
    dealer.dataset = table
    return tuple(_take(train, dealer.load_partition(i)["row"]) for i in range(clients))


@lru_cache(maxsize=32)
def encode(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """Return the examples as token ids, cut at ``max_length``; kept for the process's next use."""
    ids = tokenizer(list(examples.texts), truncation=True, max_length=max_length)["input_ids"]
    return Encoded(tuple(map(tuple, ids)), examples.labels, tokenizer.pad_token_id)


def check_client(size: int, *, batch_size: int, delta: float) -> None:
    """Check that a client of ``size`` examples can be promised what the run asks for.

    Raises:
        DataError: if it is empty, smaller than the expected batch, or δ is not below 1/size.
    """
    if size == 0:
        raise DataError("data", ": a client must have at least one example")
    if batch_size > size:
        raise DataError(
            "train.batch-size", f"={batch_size} must be at most the client's number of examples"
        )
    if delta >= 1 / size:
        raise DataError(
            "privacy.delta", f"={delta} must be below 1/n, n the client's number of examples"
        )
