"""Examples per second, and the share of training in a round, by `lalora run` in worker processes.

A BERT of MiniLM's shape with random weights on random texts, no download. The share is the training
of all clients, divided by the number of worker processes, over the time of the round: 1 if every
process trains all the time.
"""

import functools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.app_runs import run
from gpu_parts.settings import Row, Settings, Unit

_WORDS = [f"word{i}" for i in range(1000)]


@dataclass(frozen=True)
class Size:
    """The size of model and rounds.

    Attributes:
        layers: the number of layers.
        width: their width.
        tokens: the largest number of tokens of a text.
        texts: the number of texts of all clients.
        rounds: the number of rounds; the first one builds the models and does not count.
        steps: the number of local steps.
    """

    layers: int
    width: int
    tokens: int
    texts: int
    rounds: int
    steps: int


_WHOLE = Size(layers=6, width=384, tokens=64, texts=24_000, rounds=4, steps=4)
_TINY = Size(layers=1, width=24, tokens=16, texts=1_000, rounds=2, steps=2)


def _write_model(folder: Path, size: Size) -> None:
    from transformers import BertConfig, BertTokenizerFast

    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *_WORDS]), "utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(special) + len(_WORDS),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=12,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.tokens,
    )
    config.save_pretrained(folder)


def _write_texts(file: Path, size: Size) -> None:
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for i in range(size.texts):
            words = draw.choices(_WORDS, k=draw.randint(size.tokens // 8, size.tokens - 2))
            lines.write(json.dumps({"text": " ".join(words), "label": i % 2}) + "\n")


def measure(clients: int, batch: int, size: Size, settings: Settings) -> Iterator[Row]:
    """Run a few rounds and yield the medians of all but the first one."""
    with tempfile.TemporaryDirectory(prefix="lalora-gpu-") as folder:
        model, texts = Path(folder, "model"), Path(folder, "texts.jsonl")
        _write_model(model, size)
        _write_texts(texts, size)
        values = {
            "num-server-rounds": size.rounds,
            "evaluate-every": size.rounds,
            "model.name": str(model),
            "model.weights": "random",
            "model.max-length": size.tokens,
            "model.device": settings.device,
            "data.name": str(texts),
            "data.num-labels": 2,
            "data.test-fraction": 0.02,
            "data.partitioner": "iid",
            "train.local-steps": size.steps,
            "train.batch-size": batch,
            "train.micro-batch": batch,
        }
        done = run(values, clients)
    rounds = done.history[1:]
    seconds = statistics.median(entry["seconds"] for entry in rounds)
    training = {entry["attempt"]: done.training_seconds(entry["attempt"]) for entry in rounds}
    busy = {attempt: sum(found) / done.processes for attempt, found in training.items()}
    yield {
        "clients": clients,
        "processes": done.processes,
        "local_steps": size.steps,
        "batch": batch,
        "rounds": len(rounds),
        "round_s": round(seconds, 3),
        "training_s": round(statistics.median(busy.values()), 3),
        "training_share": round(
            statistics.median(busy[entry["attempt"]] / entry["seconds"] for entry in rounds), 4
        ),
        "slowest_client_s": round(statistics.median(map(max, training.values())), 3),
        "examples_per_second": round(clients * size.steps * batch / seconds, 1),
    }


def units(settings: Settings) -> list[Unit]:
    """Return one unit per number of clients."""
    size = _TINY if settings.quick else _WHOLE
    cases = [(8, 16), (20, 8)] if settings.quick else [(8, 256), (100, 64)]
    return [
        Unit(f"{clients} clients", functools.partial(measure, clients, batch, size, settings))
        for clients, batch in cases
    ]
