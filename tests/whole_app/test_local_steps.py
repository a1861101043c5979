"""Compare local steps and the exported adapter with plain torch and stock PEFT."""

import numpy as np
import pytest
import torch

from helpers.app_runs import INF, TRAIN_SIZE, arrays, local_steps, open_run, run, tokens_of
from lalora_app.adapter.factors import kind
from lalora_app.client import local_round
from lalora_app.methods.table import METHODS
from lalora_app.models import backbone
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.settings.run_config import Config

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


@pytest.mark.parametrize(
    "settings",
    [
        {"train.optimizer": "adamw", "train.momentum": 0.0, "train.weight-decay": 0.1},
        {"train.optimizer": "sgd", "train.momentum": 0.9, "train.weight-decay": 0.1},
    ],
)
@pytest.mark.parametrize(("resting", "active"), [("A", "B"), ("B", "A")])
def test_a_resting_factor_and_its_moments_stay_bit_identical(tiny, settings, resting, active):
    config = tiny(**settings)
    model, start = backbone.build(config)
    model.load({name: array + 0.5 for name, array in start.items()})
    optimizer = local_round.make_optimizer(model, local_steps(config), 0.0, {})
    parameters = model.engine.parameters

    def step(*kinds):
        grads = {n: torch.full_like(p, 0.3) for n, p in parameters.items() if kind(n) in kinds}
        local_round.apply(model, optimizer, NoisedGrads(grads))

    def moments():
        return {
            name: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
            for name, p in parameters.items()
            if kind(name) == resting
        }

    step("A", "B", "head")  # fills the moments of both
    before, kept = model.adapter(), moments()
    assert all(kept.values())
    step(active, "head")
    step(active, "head")
    after = model.adapter()
    for name in before:
        assert (before[name].tobytes() == after[name].tobytes()) == (kind(name) == resting), name
    for name, values in moments().items():
        assert all(torch.equal(kept[name][key], value) for key, value in values.items())


def plain_peft(config: Config, adapter):
    """A PEFT model made without the app's code, holding ``adapter``."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    settings = LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=2.0, target_modules=["query", "value"]
    )
    model = get_peft_model(base, settings).eval()
    set_peft_model_state_dict(model, {n: torch.from_numpy(a) for n, a in adapter.items()})
    return model


def peft_state(model):
    from peft import get_peft_model_state_dict

    return {n: p.detach().numpy().copy() for n, p in get_peft_model_state_dict(model).items()}


# Factors of the learning rates by step, of 6: the warm-up has 1.8 steps.
COSINE = [1 / 1.8, 1.0, *(0.5 + 0.5 * np.cos(np.pi * (s - 1.8) / 4.2) for s in range(2, 6))]


@pytest.mark.parametrize(
    ("method", "steps", "schedule", "factors"),
    [
        ("dp-lora", 1, {}, [1.0] * 3),
        ("la-lora-no-filter", 2, {}, [1.0] * 6),
        ("dp-lora", 2, {"train.schedule": "cosine", "train.warm-up": 0.3}, COSINE),
    ],
)
def test_one_client_without_noise_is_plain_central_training(tiny, method, steps, schedule, factors):
    rates = {"A": 0.7, "B": 0.9, "head": 0.5}
    config = tiny(
        method=method,
        **{
            "data.test-fraction": 0.11,
            "data.dirichlet-alpha": INF,
            "privacy.epsilon": INF,
            "privacy.clip-norm": INF,
            "min-clients": 1,
            "min-replies": 1,
            "num-server-rounds": 3,
            "train.local-steps": steps,
            "train.batch-size": TRAIN_SIZE,
            "train.micro-batch": 100,
            "train.optimizer": "sgd",
            "train.momentum": 0.0,
            "train.weight-decay": 0.0,
            "train.lr-a": rates["A"],
            "train.lr-b": rates["B"],
            "train.lr-head": rates["head"],
            "train.lr-decay": 0.8,
        }
        | schedule,
    )
    done = run(config, 1)
    exchanges = done.grid.trained()
    start = exchanges[0].start
    model = plain_peft(config, start)
    inputs, labels = tokens_of(config, 0)
    assert len(labels) == TRAIN_SIZE
    named = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert set(named) == set(start)
    for exchange in exchanges:
        t = exchange.order["round"]
        for k in range(steps):
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()
            with torch.no_grad():
                for name, parameter in named.items():
                    if kind(name) in METHODS[method].trains(t, k) | {"head"}:
                        rate = rates[kind(name)] * factors[(t - 1) * steps + k]
                        parameter -= rate * 0.8 ** (t - 1) * parameter.grad
        central = peft_state(model)
        for name, array in arrays(exchange.reply).items():
            np.testing.assert_allclose(array, central[name], rtol=2e-4, atol=2e-6, err_msg=name)
    moved = max(np.abs(central[name] - start[name]).max() for name in start)
    assert moved > 0.05


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_peft_loads_the_adapter_and_scores_the_same(tiny, pooling):
    import transformers
    from peft import PeftModel

    config = tiny(
        **open_run(method="dp-lora")
        | {
            "model.pooling": pooling,
            "train.local-steps": 4,
            "train.batch-size": 60,
            "train.lr-b": 0.05,
            "train.lr-head": 0.1,
        },
    )
    done = run(config)
    auto = {
        "model": "AutoModelForSequenceClassification",
        "mean": "AutoModelForTokenClassification",
    }
    base = getattr(transformers, auto[pooling]).from_pretrained(config.model.name, num_labels=2)
    inputs, labels = tokens_of(config, 1)

    def accuracy(model):
        with torch.no_grad():
            out = model.eval()(**inputs).logits
        if pooling == "mean":
            mask = inputs["attention_mask"].unsqueeze(-1)
            out = (out * mask).sum(1) / mask.sum(1)
        return (out.argmax(1) == labels).float().mean().item()

    initial = accuracy(base)
    trained = accuracy(PeftModel.from_pretrained(base, done.folder.adapter))
    assert trained == pytest.approx(done.json("summary.json")["accuracy"], abs=1e-6)
    assert trained != pytest.approx(initial, abs=1e-6)
    card = (done.folder.adapter / "README.md").read_text("utf-8")
    assert auto[pooling] in card
    assert "Not private" in card
