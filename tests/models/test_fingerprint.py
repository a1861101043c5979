"""Fingerprints of base models: equal for equal files, different for any changed part."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_config
from lalora_app.models import backbone
from lalora_app.models.fingerprint import weights_hash

IMAGES = {"model.task": "image-classification", "model.image-size": 16, "model.image-resize": 16}
KINDS = ("text", "causal", "vit", "swin")


@pytest.fixture
def folder_of(tiny_model, tiny_llama, tiny_vit, tiny_timm):
    return {"text": tiny_model, "causal": tiny_llama, "vit": tiny_vit, "swin": tiny_timm["swin"]}


def config_of(kind, folder, **changes):
    own = {
        "text": {"model.max-length": 12},
        "causal": {"model.task": "causal-lm", "model.max-length": 12, "data.label-column": "none"}
        | {"data.partitioner": "iid"},
        "vit": IMAGES,
        "swin": IMAGES,
    }[kind]
    name = f"timm:{folder}" if kind == "swin" else str(folder)
    pooling = {"model.pooling": "model"}
    return make_config(**{"model.name": name, "lora.rank": 2} | pooling | own | changes)


def fingerprint(kind, folder, **changes):
    backbone._by_rank.cache_clear()  # as another process
    return backbone.build(config_of(kind, folder, **changes))[0].fingerprint


def copy_of(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_folder_has_the_same_fingerprint(kind, folder_of, tmp_path):
    found = fingerprint(kind, copy_of(folder_of[kind], tmp_path))
    assert found == fingerprint(kind, folder_of[kind])
    assert set(found) == {"weights", "tokenizer" if kind in ("text", "causal") else "normalisation"}
    assert all(len(value) == 64 for value in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_entry_changes_the_hash_of_the_weights_only(kind, folder_of, tmp_path):
    folder = copy_of(folder_of[kind], tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(weights) if "norm" in n.lower() and n.endswith("weight"))
    weights[name].view(-1)[-1] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = fingerprint(kind, folder_of[kind]), fingerprint(kind, folder)
    assert before["weights"] != after["weights"]
    assert {**before, "weights": ""} == {**after, "weights": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_rank_seed_head_and_type_play_no_part(kind, folder_of):
    plain = fingerprint(kind, folder_of[kind])
    changes = [{"lora.rank": 4}, {"seed": 7}, {"model.dtype": "bfloat16"}]
    for change in (*changes, {"data.num-labels": 3}):
        assert fingerprint(kind, folder_of[kind], **change) == plain


@pytest.mark.parametrize("kind", ["text", "causal"])
def test_another_vocabulary_changes_the_hash_of_the_tokenizer_only(kind, folder_of, tmp_path):
    folder = copy_of(folder_of[kind], tmp_path)
    file = folder / "tokenizer.json"
    text = file.read_text("utf-8")
    assert text.count('"free"') == 1
    file.write_text(text.replace('"free"', '"cost"'), "utf-8")
    before, after = fingerprint(kind, folder_of[kind]), fingerprint(kind, folder)
    assert before["tokenizer"] != after["tokenizer"]
    assert before["weights"] == after["weights"]


def test_a_use_of_the_tokenizer_does_not_change_its_hash(folder_of):
    from transformers import AutoTokenizer

    from lalora_app.models.fingerprint import tokenizer_state

    tokenizer = AutoTokenizer.from_pretrained(folder_of["text"])
    before = tokenizer_state(tokenizer)
    tokenizer(["free prize", "call"], truncation=True, max_length=3, padding=True)
    assert tokenizer_state(tokenizer) == before


@pytest.mark.parametrize(
    ("kind", "file", "key"),
    [
        ("vit", "preprocessor_config.json", "image_mean"),
        ("swin", "config.json", "mean"),
    ],
)
def test_another_normalisation_changes_its_hash_only(kind, file, key, folder_of, tmp_path):
    folder = copy_of(folder_of[kind], tmp_path)
    settings = json.loads((folder / file).read_text("utf-8"))
    (folder / file).write_text(json.dumps(settings | {key: [0.5, 0.5, 0.51]}), "utf-8")
    before, after = fingerprint(kind, folder_of[kind]), fingerprint(kind, folder)
    assert before["normalisation"] != after["normalisation"]
    assert before["weights"] == after["weights"]


def test_random_weights_follow_the_seed(folder_of):
    one, same, other = (
        fingerprint("text", folder_of["text"], **{"model.weights": "random", "seed": seed})
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one["weights"] != other["weights"]
    assert one["tokenizer"] == other["tokenizer"]


class Layers(torch.nn.Module):
    """Frozen and trained tensors, a stored and a computed buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = torch.nn.Linear(3, 2).requires_grad_(False)
        self.head = torch.nn.Linear(2, 2)
        self.register_buffer("stored", torch.ones(3))
        self.register_buffer("computed", torch.tensor([0.3, 0.7]), persistent=False)
        self.register_buffer("scalar", torch.tensor(5))


def test_every_frozen_tensor_and_stored_buffer_is_hashed_and_no_trained_one():
    plain = weights_hash(Layers())
    for name in ("frozen.weight", "frozen.bias", "stored", "scalar"):
        changed = Layers()
        dict([*changed.named_parameters(), *changed.named_buffers()])[name].data.mul_(2)
        assert weights_hash(changed) != plain, name
    changed = Layers()
    changed.head.weight.data.mul_(2)
    assert weights_hash(changed) == plain


def test_values_of_a_computed_buffer_are_not_hashed_and_the_last_bit_of_a_stored_one_is():
    plain, computed, stored = Layers(), Layers(), Layers()
    for model, name in ((computed, "computed"), (stored, "stored")):
        buffer = dict(model.named_buffers())[name]
        buffer.copy_(torch.nextafter(buffer, torch.full_like(buffer, 9.0)))
    assert weights_hash(computed) == weights_hash(plain)
    assert weights_hash(stored) != weights_hash(plain)


def test_shapes_and_names_are_hashed():
    reshaped, plain = Layers(), Layers()
    reshaped.frozen.weight = torch.nn.Parameter(plain.frozen.weight.reshape(3, 2), False)
    assert weights_hash(reshaped) != weights_hash(plain)


@pytest.mark.slow
def test_the_demo_is_hashed_within_a_fifth_of_a_second_of_cpu():
    model = backbone.build(make_config())[0].model.float()
    began = time.process_time()
    weights_hash(model)
    assert time.process_time() - began < 0.4  # 0.1 s on an idle core; the margin is for shared ones
