"""The baseline "head-only": no factor trains, travels or takes part in the backward pass."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.autograd.graph import Node

from helpers.app_runs import arrays, open_run, run, same_bits, tokens_of
from lalora_app.adapter.factors import active_names, kind
from lalora_app.data.examples import split
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import build
from lalora_app.results.merge import merge
from lalora_app.settings.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
RATES = {"train.lr-head": 0.1, "train.batch-size": 60}


def nodes_of(output: torch.Tensor) -> list[Node]:
    """Return all nodes of the backward graph of a tensor."""
    waiting, found = [output.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting += [before for before, _ in node.next_functions]
    return found


def graph_size(config) -> int:
    model, start = build(config)
    model.load(start)
    model.engine.activate(active_names(start, METHODS[config.method].trains(1, 0)))
    encoded = model.encode(split(config.data)[0])
    return len(nodes_of(model.losses(encoded.batch(range(4)))))


def test_the_backward_pass_does_not_run_through_the_backbone(tiny):
    sizes = {
        method: [
            graph_size(tiny(method=method, **blocks)) for blocks in ({}, {"lora.layers": "last:1"})
        ]
        for method in ("head-only", "dp-lora")
    }
    assert sizes["head-only"][0] == sizes["head-only"][1] <= 12  # head, pooling, loss
    assert sizes["dp-lora"][0] > sizes["dp-lora"][1] > sizes["head-only"][0]


def test_only_the_head_travels_in_both_directions(tiny):
    done = run(tiny(**open_run(method="head-only") | RATES))
    for exchange in done.grid.trained():
        assert {kind(name) for name in arrays(exchange.request)} <= {"head"}
        assert {kind(name) for name in arrays(exchange.reply)} == {"head"}
    head = sum(x.nbytes for n, x in done.folder.latest().adapter.items() if kind(n) == "head")
    assert {row["upload_bytes"] for row in done.rows} == {head}
    assert {row["download_bytes"] for row in done.rows} == {head}
    assert {row["phase"] for row in done.rows} == {"head"}
    assert {row["aggregation_error"] for row in done.rows} == {None}
    assert {row["remaining_error"] for row in done.rows} == {None}


def test_a_run_after_another_method_in_one_process_starts_from_the_initial_factors(tiny):
    """The factors of an earlier run must not stay in the model that all runs of a process share."""
    first = tiny(**open_run(method="dp-lora") | RATES)
    run(first)
    model, start = build(tiny(**open_run(method="head-only")))
    _, whole = build(first)
    model.load(start)
    loaded = {n: p.detach().numpy() for n, p in model.engine.parameters.items()}
    assert same_bits(loaded, whole)
    assert same_bits(model.adapter(), start)
    assert not any(array.any() for name, array in loaded.items() if kind(name) == "B")


def test_peft_and_merge_load_the_trained_head_with_a_product_of_zero(tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = tiny(**open_run(method="head-only") | RATES)
    done = run(config)
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    inputs, labels = tokens_of(config, 1)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), done.folder.adapter).eval()
    with torch.no_grad():
        logits = stock(**inputs).logits
        plain = stock.merge_and_unload()(**inputs).logits
    assert torch.allclose(logits, plain, atol=1e-5)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(done.json("summary.json")["accuracy"], abs=1e-6)
    adapted = {n: x for n, x in done.adapter.items() if kind(n) == "B"}
    assert adapted
    assert not any(array.any() for array in adapted.values())
    merge(done.folder.path, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, logits, atol=1e-5)


def test_the_head_trains_as_it_does_beside_resting_factors(tiny):
    """Limit: with learning rates of zero for A and B, DP-LoRA without a clip is head-only."""
    frozen = {"train.optimizer": "sgd", "train.lr-a": 1e-30, "train.lr-b": 1e-30}
    keys = RATES | frozen | {"privacy.clip-norm": float("inf"), "privacy.noise": "seeded"}
    heads = []
    for method in ("head-only", "dp-lora"):
        config = tiny(**open_run(method=method) | keys)
        done = run(tiny(**open_run(method=method) | keys | {"output": f"{config.output}-{method}"}))
        adapter = done.folder.latest().adapter
        heads.append({n: torch.from_numpy(x) for n, x in adapter.items() if kind(n) == "head"})
    for one, other in pairwise(heads):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.allclose(one[name], other[name], atol=1e-5), name


def test_a_language_model_is_refused_before_anything_starts(texts):
    told = r'^model\.task="causal-lm" must be a classification for method head-only: .* no head'
    with pytest.raises(ConfigError, match=told):
        method_of(texts("llama", method="head-only"))
    assert method_of(texts("llama", method="dp-lora")) is METHODS["dp-lora"]
