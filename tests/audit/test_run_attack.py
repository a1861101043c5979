"""The attack on the final model takes the canaries' losses on the base that the run has moved."""

import math

import numpy as np
import pytest
import torch

from lalora_app.audit.planted_federation import Federation, mislabelled
from lalora_app.audit.run_attack import audit_run
from lalora_app.methods.table import METHODS
from lalora_app.privacy.randomness import seeded

CANARIES, CLIENTS, SEED = 30, 2, 0


def moved_weight(base, adapter, drift, name, scale):
    """W0 + B·A of the drift + s·B·A of the adapter, as one matrix."""
    total = base.astype(np.float64)
    for tensors, factor in ((drift, 1.0), (adapter, scale)):
        if f"{name}.lora_B.weight" in tensors:
            b, a = (tensors[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "BA")
            total += factor * (b @ a)
    return total.astype(np.float32)


def plain_losses(config, examples, adapter, drift):
    """Cross entropies of transformers' own model, whose weights are set to the merged matrices."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    weights = dict(model.named_parameters())
    prefix = "base_model.model."
    with torch.no_grad():
        for key in adapter:
            name = key.removeprefix(prefix)
            if ".lora_B." in name:
                layer = name.removesuffix(".lora_B.weight")
                weight = weights[f"{layer}.weight"]
                merged = moved_weight(
                    weight.numpy(),
                    adapter,
                    drift,
                    prefix + layer,
                    config.lora.alpha / config.lora.rank,
                )
                weight.copy_(torch.from_numpy(merged))
            elif ".lora_" not in name:
                weights[name].copy_(torch.from_numpy(adapter[key]))
    tokens = AutoTokenizer.from_pretrained(config.model.name)(
        list(examples.contents),
        padding=True,
        truncation=True,
        max_length=config.model.max_length,
        return_tensors="pt",
    )
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    labels = torch.tensor(examples.labels)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()


def counted_auc(scores, members):
    """The share of (member, other) pairs in which the member scores higher; a tie is a half."""
    pairs = [(x > y) + (x == y) / 2 for x in scores[members] for y in scores[~members]]
    return float(np.mean(pairs))


@pytest.mark.parametrize("method", ["flora", "rac-lora", "galore-dwa", "head-only"])
def test_the_final_losses_are_those_of_the_adapter_on_the_moved_base(tiny, tmp_path, method):
    large = {"train.lr-a": 50.0, "train.lr-b": 50.0, "lora.alpha": 16.0}
    config = tiny(method=method, **{"privacy.epsilon": math.inf} | large)
    examples = mislabelled(config, CANARIES)
    members = seeded(SEED, "audit coins").random(len(examples)) < 0.5
    federation = Federation(config, examples, members, CLIENTS, SEED, tmp_path)
    start = federation.state.adapter
    for _ in federation.rounds():
        pass
    end = federation.state
    before = plain_losses(config, examples, start, {})
    expected, without_drift = (
        counted_auc(before - plain_losses(config, examples, end.adapter, drift), members)
        for drift in (end.drift, {})
    )
    found = audit_run(config, canaries=CANARIES, clients=CLIENTS, seed=SEED, confidence=0.95)
    assert bool(end.drift) == METHODS[method].moves_base
    if end.drift:
        assert expected != pytest.approx(without_drift, abs=1e-3)
    assert found.aucs["final"] == pytest.approx(expected, abs=1e-9)
