"""A tiny BERT, a tiny dataset, and configs that differ from pyproject's defaults by a few keys."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from lalora_app.config import Config, from_tables, parse

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other are slow

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "free",
    "prize",
    "call",
    "now",
    "hello",
    "dear",
    "friend",
    "see",
    "you",
    "later",
    "ok",
]


def defaults() -> dict[str, object]:
    """The run config of pyproject.toml, flat, as Flower hands it over."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    return from_tables(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])


def make_config(**changes) -> Config:
    """Defaults with changes: make_config(method="rolora", **{"lora.rank": 4})."""
    return parse(defaults() | changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a 2-layer BERT of width 16 with a word tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """A .jsonl of 400 distinct texts whose label is whether "free" or "prize" occurs."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tiny-data") / "texts.jsonl"
    rows = []
    for i in range(400):
        label = int(i % 4 == 0)
        words = list(rng.choice(WORDS[7:], size=5)) + (["free", "prize"] if label else [])
        rows.append({"text": " ".join([*words, str(i)]), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def tiny(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Config factory on the tiny model and data; output and ledger in the test's own folder."""
    monkeypatch.setenv("LALORA_HOME", str(tmp_path / "home"))

    def build(**changes) -> Config:
        base = {
            "model.name": tiny_model,
            "model.pooling": "model",
            "model.max-length": 12,
            "data.name": tiny_data,
            "data.dirichlet-alpha": 1e9,
            "lora.rank": 2,
            "lora.alpha": 2.0,
            "num-server-rounds": 2,
            "train.local-steps": 2,
            "train.batch-size": 8,
            "output": str(tmp_path / "out"),
        }
        return make_config(**(base | changes))

    return build
