"""Linear probes of a second task, and the picture of similarity."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.architectures import save_text_model
from helpers.model_checks import TEXTS, pixels
from lalora_app.data.encoding import EncodedImages
from lalora_app.data.examples import Examples
from lalora_app.diagnosis import forgetting as module
from lalora_app.diagnosis.forgetting import (
    features,
    forgetting,
    probe_accuracy,
    second_data,
    second_task,
)
from lalora_app.diagnosis.similarity_figure import similarity_figure
from lalora_app.models.backbone import build
from lalora_app.settings.errors import ConfigError


def by_least_squares(train, labels, test, test_labels) -> float:
    """The probe as an ordinary least-squares problem with one penalty row per feature."""
    x = train - train.mean(0)
    y = np.eye(labels.max() + 1)[labels]
    side = np.sqrt(module._PENALTY * len(x) * np.square(x).mean()) * np.eye(x.shape[1])
    goal = np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weights = np.linalg.lstsq(np.concatenate([x, side]), goal, rcond=None)[0]
    right = [
        int(np.argmax((row - train.mean(0)) @ weights + y.mean(0)) == label)
        for row, label in zip(test, test_labels, strict=True)
    ]
    return sum(right) / len(right)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 5))
def test_the_probe_is_penalised_least_squares(seed, classes):
    rng = np.random.default_rng(seed)
    labels, other = (rng.permutation(np.arange(n) % classes) for n in (40, 30))
    train, test = (rng.standard_normal((len(part), 6)) + part[:, None] for part in (labels, other))
    assert probe_accuracy(train, labels, test, other) == by_least_squares(
        train, labels, test, other
    )


def test_separate_classes_are_all_found_and_equal_features_give_the_most_frequent_class():
    labels = np.arange(30) % 3
    apart = np.eye(3)[labels]
    assert probe_accuracy(apart, labels, apart, labels) == 1.0
    same = np.ones((10, 4))
    often = np.array([0] * 7 + [1] * 3)
    assert probe_accuracy(same, often, same, often) == 0.7


@pytest.mark.parametrize("kind", ["text", "mean", "image"])
def test_features_are_the_input_of_the_head(kind, tiny, images):
    keys = {"model.pooling": "mean"} if kind == "mean" else {}
    model, _ = build(images("swin") if kind == "image" else tiny(**keys))
    data = EncodedImages.of_one_size(pixels(4, 16), (0, 1, 1, 0)) if kind == "image" else TEXTS
    seen: list[torch.Tensor] = []
    lengths: list[int] = []
    found, labels = features(model, data)
    assert len(found) == len(data)
    head = [m for n, m in model.model.named_modules() if n.endswith("modules_to_save.default")][-1]
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in data.batches(1):
        lengths.append(1 if batch.mask is None else int(batch.mask.sum()))
        with torch.no_grad():
            model.logits(batch)
    hook.remove()
    pairs = zip(seen, lengths, strict=True)
    expected = [x[0, :n].mean(0) if kind == "mean" else x[0] for x, n in pairs]
    np.testing.assert_allclose(found, torch.stack(expected).double().numpy(), atol=1e-5)
    one_by_one = [int(batch.labels) for batch in data.batches(1)]
    assert labels.tolist() == one_by_one


def test_forgetting_is_nothing_at_the_start_and_leaves_the_model_as_it_was(tiny):
    config = tiny()
    model, start = build(config)
    second = second_task(second_data(config, {"data.name": config.data.name}))
    found = forgetting(config, model, {}, second)
    assert found.before == found.after
    torch.manual_seed(0)
    moved = {name: torch.randn(x.shape).numpy() for name, x in start.items()}
    model.load(moved)
    batch = TEXTS.batch([0, 1])
    before = model.logits(batch)
    again = forgetting(config, model, {}, second)
    assert again.before == found.before  # of the base, whatever the adapter
    assert torch.equal(model.logits(batch), before)
    assert all(np.array_equal(model.adapter()[name], x) for name, x in moved.items())


def test_a_second_task_may_have_other_classes(tiny, tmp_path):
    rows = [f"{word},{label}" for label, word in enumerate(["good", "bad", "new", "old"] * 8)]
    file = tmp_path / "other.csv"
    lines = [f"{row.split(',')[0]},{'abcd'[i % 4]}" for i, row in enumerate(rows)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", "utf-8")
    config = tiny()
    model, _ = build(config)
    keys = {"data.name": str(file), "data.label-column": "label", "data.test-fraction": 0.5}
    found = forgetting(config, model, {}, second_task(second_data(config, keys)))
    assert 0 <= found.before == found.after <= 1


def test_a_run_with_tasks_in_a_seeded_order_may_have_a_second_task(tiny):
    config = tiny(**{"data.tasks": 2, "data.task-order": "seeded"})
    assert second_data(config, {"data.name": "other"}).tasks == 1


def test_classes_in_turn_are_all_drawn():
    examples = Examples(("a", "b") * module.EXAMPLES, (0, 1) * module.EXAMPLES)
    drawn = module._some(examples)
    assert len(drawn) == module.EXAMPLES
    assert 0.4 < sum(drawn.labels) / len(drawn) < 0.6


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "--second-task must name the dataset: data.name"),
        ({"data.name": "x", "seed": 3}, "--second-task seed=3 must be a key of the table data"),
        ({"data.name": "x", "data.no": 3}, "--second-task data.no=3 is no key of a run"),
    ],
)
def test_a_second_task_of_other_keys_is_one_line(keys, line, tiny):
    with pytest.raises(ConfigError, match=re.escape(line)):
        second_data(tiny(), keys)


def test_a_head_of_two_modules_begins_at_the_first(tiny, tmp_path):
    """DistilBERT has pre_classifier and classifier."""
    folder = save_text_model("distilbert", tmp_path)
    model, _ = build(tiny(**{"model.name": folder, "model.pooling": "model"}))
    found, _ = features(model, TEXTS)
    inner = model.model.base_model.model.distilbert
    with torch.no_grad():
        rows = [
            inner(input_ids=batch.inputs, attention_mask=batch.mask).last_hidden_state[:, 0]
            for batch in TEXTS.batches(64)
        ]
    np.testing.assert_allclose(found, torch.cat(rows).double().numpy(), atol=1e-6)


def test_a_language_model_has_no_probe(texts):
    config = texts("llama")
    with pytest.raises(ConfigError, match=r'left out for model\.task="causal-lm"'):
        second_data(config, {"data.name": "other"})
    model, _ = build(config)
    with pytest.raises(ConfigError, match="no module of the model trains whole"):
        features(model, TEXTS)


def test_a_second_task_that_cannot_be_read_is_named(tiny, tmp_path):
    keys = {"data.name": str(tmp_path / "none.csv")}
    with pytest.raises(ConfigError, match=r"^--second-task data\.name"):
        second_task(second_data(tiny(), keys))


def test_the_picture_has_a_panel_per_run():
    panels = [("la-lora $1$", np.eye(3)), ("full", np.ones((3, 2)) / 2), ("full", np.eye(2))]
    found = similarity_figure("bert.encoder", panels)
    assert found.startswith("<svg role=")
    assert "la-lora $1$" in found
    assert "bert.encoder" in found
    assert found.count(">full<") == 2  # also of runs with equal names
    assert found == similarity_figure("bert.encoder", panels)
