"""Language models: padding changes nothing, gradients are each text's own, adapters load anywhere.

A tiny Llama and a tiny GPT-2, against transformers' own loss on one text at a time.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from conftest import WORDS, save_tokenizer
from helpers.app_runs import do_not_draw_the_report, do_not_wait_for_nodes
from helpers.fake_grid import FakeGrid
from helpers.oracle import (
    assert_engine_is_right,
    assert_equal,
    loop_gradients,
    randomise,
    trained,
    without_engine,
)
from lalora_app import server_app
from lalora_app.blocks.adapters import wire_name
from lalora_app.data.encoding import IGNORED, EncodedSequences
from lalora_app.data.examples import Examples, split
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.scores import LANGUAGE_MODEL
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

INF = float("inf")
KINDS = ("llama", "gpt2")
# Of different lengths; the id of padding, 0, is a word of two of them. A text of two tokens would
# have no gradient at a query: its only prediction comes from a token that sees itself alone.
TEXTS = EncodedSequences(((2, 5, 6, 3), (2, 0, 3), (2, 7, 8, 9, 10, 0, 3), (5, 11, 2, 12, 4)))

# peft, of an adapter for Linear layers on stock GPT-2's Conv1D: what it then does is right
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


@pytest.fixture
def causal(tiny, tiny_llama, tiny_gpt2) -> Callable[..., Config]:
    """Config factory of a tiny language model."""
    folders = {"llama": tiny_llama, "gpt2": tiny_gpt2}

    def make(kind: str, **changes) -> Config:
        base = {
            "model.name": folders.get(kind, kind),
            "model.task": "causal-lm",
            "model.max-length": 10,
            "data.label-column": "none",
            "data.partitioner": "iid",
        }
        return tiny(**base | changes)

    return make


def randomised(config: Config, std: float = 0.3) -> Backbone:
    """The backbone with a random B too: at zero it would hide the gradient of A."""
    backbone, _ = build(config)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    torch.manual_seed(0)
    for parameter in backbone.engine.parameters.values():
        nn.init.normal_(parameter, std=std)
    return backbone


def stock(config: Config) -> nn.Module:
    """The base model as anyone would load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.model.name).eval()


def their_loss(model: nn.Module, tokens: tuple[int, ...]) -> torch.Tensor:
    """transformers' own loss of one text, which is not padded at all."""
    ids = torch.tensor([tokens])
    return model(input_ids=ids, labels=ids, use_cache=False).loss


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_per_example_gradients_with_padding(kind, causal):
    backbone, _ = build(causal(kind))
    backbone.engine.activate(frozenset(backbone.engine.parameters))

    def losses(model: nn.Module, indices: list[int]) -> torch.Tensor:
        batch = TEXTS.batch(indices)  # padded to the longest: a single text is not padded at all
        logits = model(input_ids=batch.inputs, use_cache=False).logits
        return LANGUAGE_MODEL.losses(logits, batch.labels)

    assert_engine_is_right(randomise(without_engine(backbone.model)), losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_gives_the_gradients_of_transformers_own_loss(kind, causal):
    backbone = randomised(causal(kind))
    plain = without_engine(backbone.model)
    expected = loop_gradients(
        plain, lambda model, rows: their_loss(model, TEXTS.tokens[rows[0]]), [0, 1, 2, 3]
    )
    batch = TEXTS.batch([0, 1, 2, 3])
    found = backbone.engine.gradients(lambda: backbone.losses(batch), 4).dense()
    wire = {wire_name(name): grad.double() for name, grad in expected.items()}
    assert_equal(found, wire, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_the_one_that_transformers_computes(kind, causal):
    backbone = randomised(causal(kind))
    plain = without_engine(backbone.model)
    losses = backbone.losses(TEXTS.batch([2, 0, 3, 1]))
    expected = torch.stack([their_loss(plain, TEXTS.tokens[i]) for i in (2, 0, 3, 1)])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_changes_nothing(kind, causal):
    backbone = randomised(causal(kind))
    batch = TEXTS.batch([0, 1, 2, 3])
    padding = batch.labels == IGNORED
    assert padding.sum() == 9
    before = backbone.losses(batch)
    before_grads = backbone.engine.gradients(lambda: backbone.losses(batch), 4).dense()
    for word in (1, 15):
        batch.inputs[padding] = word
        assert torch.equal(backbone.losses(batch), before)
        grads = backbone.engine.gradients(lambda: backbone.losses(batch), 4).dense()
        assert all(torch.equal(grad, before_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_gradient(kind, causal):
    backbone = randomised(causal(kind))
    batch, kept = TEXTS.batch([0, 1, 2, 3]), []

    def keep(module, inputs, output):
        kept.append(output.requires_grad_())
        output.retain_grad()

    embedding = backbone.model.get_input_embeddings()
    handle = embedding.register_forward_hook(keep)
    backbone.engine.gradients(lambda: backbone.losses(batch), 4)
    handle.remove()
    heard = kept[0].grad.abs().sum(2) > 0
    # a text's last token is only ever predicted, and predicts nothing
    lengths = [len(TEXTS.tokens[i]) for i in range(4)]
    assert heard.sum(1).tolist() == [n - 1 for n in lengths]
    assert all(row[: n - 1].all() for row, n in zip(heard, lengths, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_one_token_has_neither_loss_nor_gradient(kind, causal):
    backbone = randomised(causal(kind))
    texts = EncodedSequences(((2,), (2, 5, 6)))
    for rows in ([0], [0, 0], [1, 0]):
        batch = texts.batch(rows)
        losses = backbone.losses(batch)
        assert (losses > 0).tolist() == [row == 1 for row in rows]
        grads = backbone.engine.gradients(lambda b=batch: backbone.losses(b), len(rows))
        assert (grads.norms() > 0).tolist() == [row == 1 for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_quality_is_that_of_a_loop_over_tokens(kind, causal):
    config = causal(kind)
    backbone = randomised(config)
    texts = backbone.encode(split(config.data)[1])
    surprise, right, count = loop_over_tokens(without_engine(backbone.model), texts)
    for size in (1, 64):
        found = backbone.evaluate(texts.batches(size))
        assert set(found) == {"accuracy", "perplexity"}
        assert found["accuracy"] == pytest.approx(right / count, abs=1.5 / count)
        assert found["perplexity"] == pytest.approx(math.exp(surprise / count), rel=1e-5)


@torch.no_grad()
def loop_over_tokens(model: nn.Module, texts: EncodedSequences) -> tuple[float, int, int]:
    """Return summed surprise, right predictions and number of next tokens, text by text."""
    surprise, right, count = 0.0, 0, 0
    model = model.double()
    for tokens in texts.tokens:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        for row, wanted in zip(logits[:-1], tokens[1:], strict=True):
            surprise -= float(torch.log_softmax(row, 0)[wanted])
            right += int(row.argmax() == wanted)
            count += 1
    return surprise, right, count


# --- models -----------------------------------------------------------------------------------


def test_gpt2_computes_the_same_through_linear_layers(causal):
    from transformers.pytorch_utils import Conv1D

    config = causal("gpt2")
    backbone, start = build(config)
    backbone.load(start)
    theirs, ids = stock(config), TEXTS.batch([2]).inputs
    assert sum(isinstance(m, Conv1D) for m in theirs.modules()) == 8
    assert not any(isinstance(m, Conv1D) for m in backbone.model.modules())
    with torch.no_grad():
        found = backbone.logits(TEXTS.batch([2]))
        torch.testing.assert_close(found, theirs(input_ids=ids).logits)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        p.numel() for n, p in backbone.model.named_parameters() if ".lora_" not in n
    )


@pytest.mark.parametrize(("kind", "layers"), [("llama", 4), ("gpt2", 2)])
def test_the_targets_are_the_architectures_own(kind, layers, causal):
    backbone, start = build(causal(kind))
    assert backbone.targets == layers
    assert len(start) == 2 * layers
    assert all(".lora_" in name for name in start)  # a language model's head is not trained


def test_gpt2s_transposed_layers_can_be_named_as_targets(causal):
    backbone, start = build(causal("gpt2", **{"lora.targets": "c_attn,c_proj,c_fc"}))
    assert backbone.targets == 8
    shape = start["base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"].shape
    assert shape == (64, 2)


def test_texts_are_cut_and_a_bad_max_length_is_one_line(causal):
    backbone, _ = build(causal("llama", **{"model.max-length": 6}))
    encoded = backbone.encode(Examples((" ".join(WORDS[5:]),), (0,)))
    assert len(encoded.tokens[0]) == 6
    for value, law in ((17, "at most 16"), (3, "above 3"), (1, "above 3")):
        with pytest.raises(ConfigError, match=rf"model\.max-length={value} must be {law}"):
            build(causal("llama", **{"model.max-length": value}))


def test_a_model_that_sees_later_tokens_is_refused(causal, tmp_path):
    """Its losses would depend on how far a text is padded: on the other texts of a batch."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(
        ConfigError, match=r"must be a causal model: no token may attend to a later one"
    ):
        build(causal(str(tmp_path)))


def test_a_tokenizer_without_padding_will_do(causal, tiny_gpt2, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_gpt2, folder)
    save_tokenizer(folder, pad_token=None)
    backbone, _ = build(causal(str(folder)))
    texts = backbone.encode(Examples(("free prize", "hello dear friend ok"), (0, 0)))
    assert backbone.losses(texts.batch([0, 1])).shape == (2,)
    classes = {"model.task": "text-classification", "data.label-column": "label"}
    with pytest.raises(ConfigError, match="must have a tokenizer with a padding token"):
        build(causal(str(folder), **classes))


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_need_only_the_folders_config(kind, causal, tmp_path, request):
    folder = tmp_path / kind
    shutil.copytree(request.getfixturevalue(f"tiny_{kind}"), folder)
    (folder / "model.safetensors").unlink()
    config = causal(str(folder), **{"model.weights": "random"})
    backbone, _ = build(config)
    assert backbone.losses(TEXTS.batch([0, 2])).shape == (2,)
    with pytest.raises(ConfigError, match=r'model\.name="[^"]*" cannot be loaded'):
        build(causal(str(folder)))


# --- a whole run ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_with_its_perplexity_and_an_adapter_for_the_stock_model(
    kind, causal, monkeypatch
):
    from peft import PeftModel

    do_not_wait_for_nodes(monkeypatch)
    do_not_draw_the_report(monkeypatch)
    rates = {"train.optimizer": "adamw", "train.lr-a": 0.1, "train.lr-b": 0.1}
    sizes = {"num-server-rounds": 2, "train.batch-size": 24, "train.local-steps": 6}
    repeatable = {"privacy.epsilon": INF, "privacy.noise": "seeded"}
    config = causal(kind, **rates, **sizes, **repeatable)
    server_app.run(FakeGrid(config, 2), config)
    (folder,) = Path(config.output).iterdir()
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["status"] == "completed"
    assert "balanced_accuracy" not in summary
    rows = [json.loads(x) for x in (folder / "history.jsonl").read_text("utf-8").splitlines()]
    assert [row["perplexity"] for row in rows][-1] == summary["perplexity"]

    backbone, start = build(config)
    texts = backbone.encode(split(config.data)[1])
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(adapter[name].tobytes() != start[name].tobytes() for name in start)
    assert set(adapter) == set(start)
    reloaded = PeftModel.from_pretrained(stock(config), folder / "adapter").eval()
    backbone.load(adapter)
    with torch.no_grad():
        for row in range(3):
            batch = texts.batch([row])
            theirs = reloaded(input_ids=batch.inputs).logits
            torch.testing.assert_close(backbone.logits(batch), theirs)
    surprise, right, count = loop_over_tokens(reloaded, texts)
    assert summary["perplexity"] == pytest.approx(math.exp(surprise / count), rel=1e-5)
    assert summary["accuracy"] == pytest.approx(right / count, abs=1.5 / count)
    backbone.load(start)
    assert summary["perplexity"] < backbone.evaluate(texts.batches(64))["perplexity"] - 0.1
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    assert "AutoModelForCausalLM" in card
    assert f"perplexity {summary['perplexity']:.4f}" in card


def test_only_factors_train(causal):
    backbone, _ = build(causal("llama"))
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    assert all(".lora_" in name for name in trained(backbone.model))
