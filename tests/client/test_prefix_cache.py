"""A client's kept states: in the site's folder or in memory, and told when they are not used."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import WORDS
from helpers.app_runs import open_run, run
from helpers.architectures import save_text_model
from helpers.model_checks import damaged
from lalora_app.blocks.kept_states import StatesInFile, StatesInMemory
from lalora_app.blocks.with_states import WithStates
from lalora_app.client import prefix_cache, requests
from lalora_app.client.site import admit
from lalora_app.data.encoding import Encoded
from lalora_app.settings.run_config import Config

CACHE = {"lora.layers": "last:1", "model.prefix-cache": True}
ALL = range(12)


@pytest.fixture(autouse=True)
def said(monkeypatch) -> list[str]:
    """The lines in the client's log; the memory is empty, and every line is new."""
    lines: list[str] = []
    prefix_cache._say_once.cache_clear()
    log = SimpleNamespace(info=lambda form, line: lines.append(form % line))
    monkeypatch.setattr(prefix_cache, "_log", log)
    monkeypatch.setattr(prefix_cache, "_IN_MEMORY", StatesInMemory())
    return lines


@pytest.fixture
def base(tmp_path) -> str:
    return save_text_model("bert", tmp_path / "base", initializer_range=0.3)


@pytest.fixture
def config(tiny, base) -> Config:
    return tiny(**open_run() | CACHE | {"data.num-labels": 2, "model.name": base})


@pytest.fixture
def node(tmp_path) -> dict[str, object]:
    path = tmp_path / "data.jsonl"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[5:], size=1 + i % 9)) for i in range(60)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    cache = str(tmp_path / "cache")
    return {"data-path": str(path), "max-epsilon": float("inf"), "name": "a", "data-cache": cache}


def loaded(config: Config, node: dict[str, object]) -> WithStates:
    data = requests._load(config, admit(config, node, 1))[2]
    assert isinstance(data, WithStates)
    return data


def never(batch):
    raise AssertionError("all states are kept")


def whole(data: Encoded) -> torch.Tensor:
    return data.batch(ALL, 16).states


def states_file(node) -> Path:
    (path,) = Path(str(node["data-cache"])).glob("*.states")
    return path


def test_a_site_that_names_a_folder_computes_states_once(config, node, said):
    first = loaded(config, node)
    assert isinstance(first.kept, StatesInFile)
    expected = whole(first)
    assert torch.equal(whole(replace(loaded(config, node), compute=never)), expected)
    assert states_file(node).stat().st_mode & 0o777 == 0o600
    assert prefix_cache._IN_MEMORY.size_in_bytes() == 0
    assert said == []


def test_without_a_folder_nothing_is_written(config, node, tmp_path):
    del node["data-cache"]
    loaded(config, node)  # remembers the number of examples
    before = sorted(tmp_path.rglob("*"))
    expected = whole(loaded(config, node))
    assert sorted(tmp_path.rglob("*")) == before
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"sizes"}  # no states
    assert torch.equal(whole(replace(loaded(config, node), compute=never)), expected)
    # the true tokens of each text, 16 features of two bytes, and a key of 32 bytes
    tokens = [loaded(config, node).length(index) for index in ALL]
    assert prefix_cache._IN_MEMORY.size_in_bytes() == sum(32 * n + 32 for n in tokens)


def test_without_the_key_there_is_no_cache(config, node):
    plain = replace(config, model=replace(config.model, prefix_cache=False))
    assert not isinstance(requests._load(plain, admit(plain, node, 1))[2], WithStates)


def test_states_of_other_weights_are_told_and_computed_anew(config, node, said, base, tmp_path):
    stale = whole(loaded(config, node))
    other = save_text_model("bert", tmp_path / "other", initializer_range=0.2)
    changed = replace(config, model=replace(config.model, name=other))
    found = whole(loaded(changed, node))
    assert said == [
        "LaLoRA client: the prefix cache is of other weights, settings or data, and is made anew"
    ]
    memory_only = {key: value for key, value in node.items() if key != "data-cache"}
    assert torch.equal(found, whole(loaded(changed, memory_only)))
    assert not torch.equal(found, stale)


def test_another_activation_is_another_model(config, node, base, tmp_path, said):
    """Its weights are the same, and so is their hash."""
    stale = whole(loaded(config, node))
    settings = json.loads((Path(base) / "config.json").read_text("utf-8"))
    text = json.dumps(settings | {"hidden_act": "relu"}).encode()
    other = damaged(base, tmp_path / "relu", "config.json", text)
    found = whole(loaded(replace(config, model=replace(config.model, name=other)), node))
    assert len(said) == 1
    assert not torch.equal(found, stale)


def test_a_changed_row_is_computed_anew(config, node):
    whole(loaded(config, node))
    path = Path(str(node["data-path"]))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[3]["text"] = " ".join(reversed(rows[3]["text"].split()))  # of the same length
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    data, computed = loaded(config, node), []

    def compute(batch):
        computed.append(len(batch.labels))
        return data.compute(batch)

    found = whole(replace(data, compute=compute))
    assert computed == [1]
    memory_only = {key: value for key, value in node.items() if key != "data-cache"}
    torch.testing.assert_close(found, whole(loaded(config, memory_only)))


def test_damaged_states_are_computed_anew(config, node):
    expected = whole(loaded(config, node))
    content = bytearray(states_file(node).read_bytes())
    content[100:] = bytes(len(content) - 100)
    states_file(node).write_bytes(content)
    assert torch.equal(whole(loaded(config, node)), expected)
    assert torch.equal(whole(replace(loaded(config, node), compute=never)), expected)


def test_a_folder_that_cannot_be_written_is_told(config, node, said, monkeypatch):
    def refuses(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prefix_cache, "StatesInFile", refuses)
    whole(loaded(config, node))
    assert said == [
        "LaLoRA client: the prefix cache is kept in memory: data-cache cannot be written: "
        "[Errno 13] Permission denied"
    ]
    assert prefix_cache._IN_MEMORY.size_in_bytes() > 0


def test_a_cache_that_is_too_small_is_told(config, node, said, monkeypatch):
    lengths = [loaded(config, node).length(index) for index in range(60)]
    assert said == []
    room = sum(32 * n + 32 for n in lengths[:7]) + 40
    for key, bound in (({}, "FILE_BYTES"), ({"data-cache": None}, "MEMORY_BYTES")):
        monkeypatch.setattr(prefix_cache, bound, room)
        given = {name: value for name, value in (node | key).items() if value is not None}
        prefix_cache._say_once.cache_clear()
        loaded(config, given)
        assert said.pop().startswith("LaLoRA client: the prefix cache holds 7 of 60 examples in ")


@pytest.mark.usefixtures("no_waiting", "no_report")
@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("la-lora", {}),
        ("flora", {}),
        ("flat-lora", {}),
        ("beamlora", {}),
        ("head-only", {}),
        ("dp-lora", {"train.head-rounds": 2, "num-server-rounds": 4}),
        ("full", {"train.head-rounds": 2, "num-server-rounds": 4}),
    ],
)
def test_a_run_with_the_cache_is_the_run_without(method, own, tiny, base, tmp_path):
    """Seeded noise: the adapters differ by the rounding of the states only."""
    keys = open_run(method=method) | CACHE | {"model.name": base, "privacy.noise": "seeded"} | own
    keys |= {"train.optimizer": "sgd", "train.lr-a": 0.1, "train.lr-b": 0.1, "train.lr-head": 0.1}
    found = run(tiny(**keys, output=str(tmp_path / "with"))).adapter
    assert prefix_cache._IN_MEMORY.size_in_bytes() > 0
    expected = run(
        tiny(**keys | {"model.prefix-cache": False}, output=str(tmp_path / "without"))
    ).adapter
    assert found.keys() == expected.keys()
    off = [float(np.abs(found[name] - tensor).max()) for name, tensor in expected.items()]
    assert 0 < max(off) < 0.01
