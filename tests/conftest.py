"""A tiny BERT, a tiny dataset, and configs that differ from pyproject's defaults by a few keys."""

import importlib
import json
import os
import tomllib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from lalora_app.settings.errors import DataError
from lalora_app.settings.run_config import Config, Data, from_tables, parse

# The models are tiny, and threads that wait for each other are slow. torch reads this when a test
# module imports it: the controller of xdist runs no test, and must not wait for that import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("lalora", deadline=None)  # no test depends on the machine's speed
settings.load_profile("lalora")

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
    return parse(defaults() | {"data.num-labels": 2} | changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a 2-layer BERT of width 16 with a word tokenizer."""
    import torch
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


@pytest.fixture(scope="session")
def tiny_keys(tiny_model, tiny_data) -> dict[str, object]:
    """Config keys of a short run on the tiny model and data."""
    return {
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
    }


@pytest.fixture
def tiny(tiny_keys, tmp_path, monkeypatch):
    """Config factory on the tiny model and data; output and ledger in the test's own folder."""
    monkeypatch.setenv("LALORA_HOME", str(tmp_path / "home"))

    def build(**changes) -> Config:
        return make_config(**(tiny_keys | {"output": str(tmp_path / "out")} | changes))

    return build


def save_tokenizer(folder: Path, **options) -> None:
    """The word tokenizer of the tiny models."""
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), **options).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """Folder of a 2-layer Llama of width 16 with the word tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    """Folder of a 2-layer GPT-2 of width 16 with the word tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes, **ends))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # they begin at zero
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


TIMM_CLASSES = {
    "swin": (
        "timm.models.swin_transformer.SwinTransformer",
        {
            "img_size": 16,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [1, 2],
        },
    ),
    "vit": (
        "timm.models.vision_transformer.VisionTransformer",
        {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    ),
    "swinv2": (
        "timm.models.swin_transformer_v2.SwinTransformerV2",
        {
            "img_size": 16,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [1, 2],
        },
    ),
    "beit": (
        "timm.models.beit.Beit",
        {
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "init_values": 0.1,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": True,
        },
    ),
    "convnext": (
        "timm.models.convnext.ConvNeXt",
        {"patch_size": 1, "depths": [1] * 4, "dims": [8, 8, 8, 16], "ls_init_value": 0.1},
    ),
}


def timm_class(kind: str, **changes):
    """A model of a timm class and the arguments of its folder, built as timm's users do."""
    path, arguments = TIMM_CLASSES[kind]
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments | changes)


@pytest.fixture(scope="session")
def tiny_timm(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models of timm, one of every class, weights without their head."""
    import torch
    from safetensors.torch import save_file

    folders = {}
    for kind, (path, arguments) in TIMM_CLASSES.items():
        folder = tmp_path_factory.mktemp(f"tiny-{kind}")
        torch.manual_seed(0)
        weights = timm_class(kind, num_classes=0).state_dict()
        for name, weight in weights.items():
            if kind == "swinv2" and ".norm" in name and not weight.any():
                torch.nn.init.normal_(weight)  # at zero, as they begin, no block has an effect
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors")
        settings = {"class": path, "kwargs": arguments, "mean": [0.4] * 3, "std": [0.2] * 3}
        (folder / "config.json").write_text(json.dumps(settings), "utf-8")
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> str:
    """Folder of a 2-layer ViT of transformers with a head of five labels."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("tiny-hf-vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3])
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> str:
    """Folder of 120 PNGs of 16 x 16 pixels by class: a dark and a light one, with noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tiny-images")
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir()
        for i in range(60):
            pixels = rng.integers(0, 192, (16, 16, 3)) + 64 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture
def images(tiny, tiny_timm, tiny_vit, tiny_images) -> Callable[..., Config]:
    """Config factory of a tiny image model: timm's "swin" or "vit", or transformers' "hf-vit"."""

    def make(kind: str = "swin", **changes) -> Config:
        names = {name: f"timm:{folder}" for name, folder in tiny_timm.items()}
        base = {
            "model.name": (names | {"hf-vit": tiny_vit}).get(kind, kind),
            "data.name": tiny_images,
            "data.input-column": "image",
            "data.test-fraction": 0.2,
            "model.task": "image-classification",
            "model.pooling": "model",
            "model.image-size": 16,
            "model.image-resize": 16,
        }
        return tiny(**base | changes)

    return make


@pytest.fixture
def texts(tiny, tiny_llama) -> Callable[..., Config]:
    """Config factory of a tiny text model: "bert", or the language model "llama"."""

    def make(kind: str = "bert", **changes) -> Config:
        language = {
            "model.name": tiny_llama,
            "model.task": "causal-lm",
            "data.label-column": "none",
            "data.partitioner": "iid",
        }
        return tiny(**(language if kind == "llama" else {}) | changes)

    return make


def described(name, **changes) -> Data:
    """The data of a run, dealt IID to two labels."""
    values = {
        "subset": "none",
        "train_split": "train",
        "test_split": "none",
        "input_column": "text",
        "label_column": "label",
        "labels": "auto",
        "encoding": "auto",
        "separator": "auto",
        "white_level": 0.0,
        "num_labels": 2,
        "test_fraction": 0.2,
        "partitioner": "dirichlet",
        "dirichlet_alpha": float("inf"),
        "classes_per_client": 2,
        "shards_per_client": 2,
        "client_column": "client",
        "tasks": 1,
        "task_column": "none",
        "task_values": "auto",
        "task_order": "listed",
        "public_size": False,
    }
    return Data(name=str(name), **values | changes)


def written(path: Path, rows: list[dict]) -> Path:
    """A .jsonl of the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@contextmanager
def one_line(key: str, *words: str):
    """Expect a DataError of one line that begins with its key and has the words."""
    with pytest.raises(DataError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(key)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert caught.value.key == key


@pytest.fixture
def no_waiting(monkeypatch):
    """Runs over FakeGrid begin at once."""
    from helpers.app_runs import do_not_wait_for_nodes

    do_not_wait_for_nodes(monkeypatch)


@pytest.fixture
def rounds(monkeypatch):
    """Record every local round of the test, in order."""
    from helpers.app_runs import spied

    return spied(monkeypatch)


@pytest.fixture
def no_report(monkeypatch):
    """Runs over FakeGrid draw no page."""
    from helpers.app_runs import do_not_draw_the_report

    do_not_draw_the_report(monkeypatch)


@pytest.fixture
def code_of_models(tmp_path, monkeypatch) -> None:
    """transformers copies a folder's code before it runs it: into the test's own folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def wide_softmax(monkeypatch) -> None:
    """Gemma-2 and Bloom ask for a softmax in float32: compute it in float64."""
    from torch.nn import functional

    plain = functional.softmax
    monkeypatch.setattr(functional, "softmax", lambda x, dim=None, **_: plain(x, dim))
