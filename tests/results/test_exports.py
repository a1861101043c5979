"""What a run writes computes what was trained, for every architecture.

Adapter and merged weights round differently from the run's own forward pass: W x + s B (A x)
against (W + s B A) x, in float32 over two layers. That is below 1e-6 of the largest logit; the
bound is 1e-4. Another head, a transposed weight or a missing tensor is above 0.1. The largest
differences are printed at the end (``pytest -s``).
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from conftest import WORDS, save_tokenizer
from helpers.architectures import save_image_model, save_text_model, text_model
from helpers.exported import (
    CLASSES,
    NAMES,
    Exported,
    exported,
    logits_of,
    random_texts,
    scores_in_order,
    stock_base,
    tokens_of,
)
from helpers.model_checks import normalised
from helpers.model_checks import stock as stock_image_model

pytestmark = pytest.mark.usefixtures("code_of_models")
TEXTS = random_texts()
PAIRS = list(zip(TEXTS, random_texts()[::-1], strict=True))
STATES: dict[str, dict[str, bool]] = {
    "plain": {},
    "drift": {"drift": True},
    "mixed ranks": {"mixed": True},
}
# run always: the model whose weights are transposed, and those that differ most from BERT
ALWAYS = {
    ("bert", "mean", "mixed ranks"),
    ("bert", "model", "drift"),
    ("gpt2", "mean", "plain"),
    ("gpt2", "model", "drift"),
    ("deberta-v3", "mean", "drift"),
    ("modernbert", "model", "plain"),
}
ENCODERS = "bert roberta distilbert electra albert deberta deberta-v2 deberta-v3 modernbert t5"
DECODERS = "gpt2 llama mistral qwen2 qwen3 gemma gemma2 phi phi3 bloom gpt-neox mixtral"
ONLY_MODEL = "opt gemma3"  # transformers has no classifier of their tokens
LARGEST: dict[str, float] = {}


def cells(kinds: str, poolings: str) -> list[Any]:
    """Every architecture, pooling and state; all but a few are marked as wide."""
    grid = [(k, p, s) for k in kinds.split() for p in poolings.split() for s in STATES]
    return [c if c in ALWAYS else pytest.param(*c, marks=pytest.mark.wide) for c in grid]


@pytest.fixture(scope="module", autouse=True)
def _printed() -> Iterator[None]:
    yield
    for name, difference in sorted(LARGEST.items()):
        print(f"\n{name:40s} {difference:.1e}", end="")


def assert_same(found: Tensor, expected: Tensor, name: str, bound: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert expected.std(0).max() > 0.02, "the inputs must differ in their logits"
    difference = float((found - expected).abs().max() / expected.abs().max())
    LARGEST[name] = max(difference, LARGEST.get(name, 0.0))
    assert difference < bound, name


def with_adapter(done: Exported, base: nn.Module) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, done.adapter).eval()


def card_logits(done: Exported, **inputs: Any) -> Tensor:
    """By the code of the model card: the adapter on the stock model."""
    card = (done.adapter / "README.md").read_text("utf-8")
    code = re.findall("```python\n(.*?)```", card, re.DOTALL)[0]
    with torch.no_grad():
        exec(code.replace("path/to/this/folder", str(done.adapter)), inputs)
    logits: Tensor = inputs["logits"]
    return logits


def adapter_on_stock(done: Exported, texts: list[Any]) -> Tensor:
    pairs = isinstance(texts[0], tuple)
    columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [texts]
    return card_logits(done, **dict(zip(("texts", "others"), columns, strict=False)))


def piped(folder: Path, texts: list[Any], **options: Any) -> Tensor:
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder), device="cpu", **options)
    inputs = [{"text": t[0], "text_pair": t[1]} if isinstance(t, tuple) else t for t in texts]
    answers = classify(inputs, top_k=None, function_to_apply="none", batch_size=5)
    return scores_in_order(answers)


def assert_classifies_alike(done: Exported, texts: list[Any], kind: str) -> None:
    """Adapter on the stock model, merged weights, and the pipelines of both."""
    expected, pooling = done.logits(texts), done.config.model.pooling
    trusted: dict[str, Any] = {"trust_remote_code": True}
    # the stock pipeline cuts no text on its own
    merged = trusted if pooling == "mean" else {"truncation": True}
    assert_same(adapter_on_stock(done, texts), expected, f"{kind} {pooling} adapter")
    found = logits_of(done.load_merged(), tokens_of(done.merged, texts))
    assert_same(found, expected, f"{kind} {pooling} merged")
    found = piped(done.adapter, texts, **trusted)
    assert_same(found, expected, f"{kind} {pooling} adapter, pipeline")
    found = piped(done.merged, texts, **merged)
    assert_same(found, expected, f"{kind} {pooling} merged, pipeline")


def save_letters(folder: Path) -> None:
    """A tokenizer of letters: transformers gives Qwen2 no other class than this."""
    from transformers import Qwen2Tokenizer

    ids = {token: i for i, token in enumerate(["<|endoftext|>", *sorted({*"".join(WORDS)}), "Ġ"])}
    Qwen2Tokenizer(vocab=ids, merges=[]).save_pretrained(folder)


@pytest.fixture
def classifier(tiny, tmp_path):
    """A random result of a text classifier, written and merged."""

    def make(kind: str, pooling: str, state: str = "plain", **changes: Any) -> Exported:
        model = {
            key: changes.pop(key) for key in ("head", "num_labels", "id2label") if key in changes
        }
        # larger than the usual 0.02, so that texts differ in their logits
        size = {"vocab_size": 64} if kind == "qwen2" else {}
        name = save_text_model(kind, tmp_path / "base", initializer_range=0.3, **size, **model)
        if kind == "qwen2":
            save_letters(Path(name))
        keys = {"model.name": name, "model.pooling": pooling, "lora.alpha": 3.0}
        return exported(tiny(**keys | CLASSES | changes), tmp_path, **STATES[state])

    return make


@pytest.mark.parametrize(
    ("kind", "pooling", "state"),
    cells(f"{ENCODERS} {DECODERS}", "mean model") + cells(ONLY_MODEL, "model"),
)
def test_a_text_classifier(kind, pooling, state, classifier):
    assert_classifies_alike(classifier(kind, pooling, state), TEXTS, kind)


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("kind", ["bert", pytest.param("deberta", marks=pytest.mark.wide)])
def test_pairs_of_texts(kind, pooling, classifier):
    done = classifier(kind, pooling, **{"data.input-column": "text,other", "model.max-length": 16})
    assert done.segmented == (kind == "bert")
    assert_classifies_alike(done, PAIRS, f"{kind}, pairs,")


def test_layers_that_the_checkpoint_lacks_are_exported(classifier):
    done = classifier("bert", "model", head="MaskedLM")
    assert any("pooler" in name for name in done.backbone.engine.parameters)
    assert_classifies_alike(done, TEXTS, "bert without pooler")


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("t5", marks=pytest.mark.wide)])
def test_all_linear_layers(kind, classifier):
    done = classifier(kind, "model", **{"lora.targets": "all-linear"})
    assert_classifies_alike(done, TEXTS, f"{kind} all-linear")


@pytest.mark.parametrize(
    ("kind", "pooling", "state"),
    [
        ("bert", "mean", "drift"),
        pytest.param("gpt2", "model", "plain", marks=pytest.mark.wide),
        pytest.param("deberta-v3", "model", "mixed ranks", marks=pytest.mark.wide),
    ],
)
def test_adapters_in_the_last_block_alone(kind, pooling, state, classifier):
    """Stock PEFT adapts the same layers by the saved config, and finds a tensor for each."""
    done = classifier(kind, pooling, state, **{"lora.layers": "last:1"})
    saved = json.loads((done.adapter / "adapter_config.json").read_text("utf-8"))
    assert saved["layers_to_transform"] == [1]
    assert saved["layers_pattern"] == ("h" if kind == "gpt2" else "layer")
    assert_classifies_alike(done, TEXTS, f"{kind} last block")


@pytest.mark.wide
@pytest.mark.parametrize("method", ["beamlora", "sd-lora", "duallora", "losa"])
def test_methods_that_train_other_tensors(method, classifier):
    done = classifier("bert", "mean", method=method)
    assert_classifies_alike(done, TEXTS, method)


def test_a_checkpoint_in_bfloat16(tiny, tmp_path):
    """The run computes in float32 from its weights, and so do its results."""
    name = save_text_model("bert", tmp_path / "base")
    text_model("bert", initializer_range=0.3).bfloat16().save_pretrained(name)
    done = exported(tiny(**{"model.name": name} | CLASSES), tmp_path)
    assert done.load_merged().dtype == torch.float32
    assert_classifies_alike(done, TEXTS, "bert in bfloat16")


# --- no other head in silence -----------------------------------------------------------------


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_the_mean_of_tokens_is_refused_without_its_code(folder, classifier):
    import transformers

    path = str(getattr(classifier("bert", "mean"), folder))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.pipeline("text-classification", model=path, trust_remote_code=False)
    for head in ("SequenceClassification", "TokenClassification"):
        auto = getattr(transformers, f"AutoModelFor{head}")
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(path, trust_remote_code=False)


@pytest.fixture
def on_the_hub(classifier, monkeypatch):
    """The adapter's folder as transformers reads it on the hub: without its config.json."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def make(pooling: str, **changes: Any) -> Exported:
        done = classifier("bert", pooling, **{"num_labels": len(NAMES)} | changes)
        (done.adapter / "config.json").unlink()
        return done

    return make


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_on_the_hub_no_other_head_is_loaded(head, on_the_hub):
    import transformers

    auto = getattr(transformers, f"AutoModelFor{head}")
    with pytest.raises(OSError, match="couldn't find them"):
        auto.from_pretrained(str(on_the_hub("mean").adapter))


def test_on_the_hub_the_own_head_is_loaded(on_the_hub):
    from transformers import AutoModelForSequenceClassification

    done = on_the_hub("model")
    model = AutoModelForSequenceClassification.from_pretrained(done.adapter).eval()
    found = logits_of(model, tokens_of(done.adapter, TEXTS))
    assert_same(found, done.logits(TEXTS), "bert model adapter, hub")


def test_on_the_hub_names_of_another_task_are_refused(on_the_hub):
    """They would be said in the place of the run's: the adapter holds no names."""
    from transformers import AutoModelForSequenceClassification

    done = on_the_hub("model", id2label={0: "sad", 1: "glad", 2: "angry"})
    with pytest.raises(OSError, match="couldn't find them"):
        AutoModelForSequenceClassification.from_pretrained(done.adapter)
    assert_same(adapter_on_stock(done, TEXTS), done.logits(TEXTS), "bert model adapter")


@pytest.mark.parametrize("own", [3, *(pytest.param(n, marks=pytest.mark.wide) for n in (2, 5))])
def test_labels_of_the_base_are_not_those_of_the_run(own, classifier):
    """Whether the base has fewer, as many or more labels, with names of its own."""
    done = classifier("bert", "model", num_labels=own)
    assert_classifies_alike(done, TEXTS, f"bert of {own} labels")
    saved = json.loads((done.merged / "config.json").read_text("utf-8"))
    assert saved["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert saved["label2id"] == {name: i for i, name in enumerate(NAMES)}
    assert saved["problem_type"] == "single_label_classification"


def test_no_path_of_the_machine_is_written(classifier, tmp_path):
    done = classifier("bert", "mean")
    for file in done.merged.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    written = json.loads((done.adapter / "config.json").read_text("utf-8"))
    assert written.pop("base") == done.config.model.name  # as the config names it
    assert str(tmp_path) not in json.dumps(written)


# --- decoders without a padding token ---------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.wide)])
def test_a_decoder_that_pads_with_its_end_token(kind, pooling, tiny, tmp_path):
    """Its own tokenizer pads on the left; that of the results pads on the right, as the run."""
    name = save_text_model(kind, tmp_path / "base", pad_token_id=None)
    save_tokenizer(Path(name), pad_token=None, eos_token="[SEP]", padding_side="left")
    done = exported(tiny(**{"model.name": name, "model.pooling": pooling} | CLASSES), tmp_path)
    assert_classifies_alike(done, TEXTS, f"{kind} without padding")


# --- language models --------------------------------------------------------------------------


def generator(folder: Path) -> nn.Module:
    from transformers import pipeline

    return pipeline("text-generation", model=str(folder), device="cpu").model


@pytest.mark.parametrize("state", ["drift"])
@pytest.mark.parametrize(
    "kind",
    ["gpt2", *(pytest.param(k, marks=pytest.mark.wide) for k in f"{DECODERS[5:]} opt".split())],
)
def test_a_language_model(kind, state, texts, tmp_path):
    """Tied embeddings and output layers among them: GPT-2, Qwen2, Gemma, Bloom and OPT."""
    check_language_model(kind, state, texts, tmp_path)


def test_a_language_model_with_adapters_in_its_last_block(texts, tmp_path):
    done = check_language_model("llama", "plain", texts, tmp_path, **{"lora.layers": "last:1"})
    assert done.backbone.targets == 2


def check_language_model(kind, state, texts, tmp_path, **changes) -> Exported:
    name = save_text_model(kind, tmp_path / "base", head="CausalLM", initializer_range=0.1)
    targets = "all-linear" if kind == "gpt2" else "auto"
    keys = {"model.name": name, "lora.targets": targets, "lora.alpha": 3.0}
    config = texts("llama", **keys | changes)
    done = exported(config, tmp_path, **STATES[state])
    assert tokens_of(done.merged, TEXTS[:1]).keys() == {"input_ids", "attention_mask"}
    batch = done.batch(TEXTS)
    kept = batch.labels != -100
    expected = done.backbone.logits(batch)[kept].detach()
    models = {
        "adapter": with_adapter(done, stock_base(config)),
        "merged": done.load_merged(),
        "adapter, pipeline": generator(done.adapter),
        "merged, pipeline": generator(done.merged),
    }
    for label, model in models.items():
        with torch.no_grad():
            logits = model(input_ids=batch.inputs, attention_mask=kept.long()).logits
        assert_same(logits[kept], expected, f"{kind} language model {label}")
    assert_same(
        card_logits(done, text=TEXTS[5])[0],
        done.logits(TEXTS[5:6])[0],
        f"{kind} language model card",
    )
    return done


# --- images -----------------------------------------------------------------------------------


def png_files(height: int, width: int, count: int = 8) -> list[bytes]:
    """Images of smooth colours."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        buffer = io.BytesIO()
        small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def seen(folder: Path, files: list[bytes]) -> dict[str, Tensor]:
    """The pixels that a folder's own image processor gives."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    return dict(processor([Image.open(io.BytesIO(f)) for f in files], return_tensors="pt"))


def piped_images(folder: Path, files: list[bytes], **options: Any) -> Tensor:
    from transformers import pipeline

    classify = pipeline("image-classification", model=str(folder), device="cpu", **options)
    opened = [Image.open(io.BytesIO(file)) for file in files]
    return scores_in_order(classify(opened, top_k=len(NAMES), function_to_apply="none"))


IMAGE_KINDS = ["vit", "deit", "beit", "dinov2", "swin", "swinv2", "convnext", "convnextv2"]


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("vit", "drift"),
        ("swinv2", "plain"),
        *(
            pytest.param(kind, state, marks=pytest.mark.wide)
            for kind in IMAGE_KINDS
            for state in STATES
        ),
    ],
)
def test_an_image_classifier(kind, state, images, tmp_path):
    check_image_classifier(kind, state, images, tmp_path)


def test_an_image_classifier_with_adapters_in_its_last_block(images, tmp_path):
    done = check_image_classifier("vit", "plain", images, tmp_path, **{"lora.layers": "last:1"})
    assert done.backbone.targets == 2


def check_image_classifier(kind, state, images, tmp_path, **changes) -> Exported:
    name = save_image_model(kind, tmp_path / "base")
    done = exported(images(name, **CLASSES | changes), tmp_path, **STATES[state])
    files = png_files(16, 16)
    expected = done.logits(files)
    inputs = {"pixel_values": normalised(done.batch(files).inputs, [0.4] * 3, [0.2] * 3)}
    found = logits_of(with_adapter(done, stock_base(done.config)), inputs)
    assert_same(found, expected, f"{kind} adapter")
    found = logits_of(done.load_merged(), seen(done.merged, files))
    assert_same(found, expected, f"{kind} merged")
    found = piped_images(done.adapter, files, trust_remote_code=True)
    assert_same(found, expected, f"{kind} adapter, pipeline")
    found = piped_images(done.merged, files)
    assert_same(found, expected, f"{kind} merged, pipeline")
    return done


@pytest.mark.parametrize(("height", "width"), [(24, 20), (40, 58)])
def test_the_image_processor_cuts_as_the_run_does(height, width, images, tmp_path):
    """Up to the rounding of bicubic pixels to 8 bits, which differs between Pillow and torch."""
    name = save_image_model("vit", tmp_path / "base")
    done = exported(images(name, **CLASSES | {"model.image-resize": 18}), tmp_path)
    files = png_files(height, width)
    found = logits_of(done.load_merged(), seen(done.merged, files))
    assert_same(found, done.logits(files), f"vit, images of {width} x {height}", bound=0.02)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("vit", "plain"),
        ("swin", "drift"),
        *(
            pytest.param(kind, "mixed ranks", marks=pytest.mark.wide)
            for kind in ("swinv2", "beit", "convnext")
        ),
    ],
)
def test_a_timm_classifier(kind, state, images, tmp_path):
    check_timm_classifier(kind, state, images, tmp_path)


def test_a_timm_classifier_with_adapters_in_its_last_block(images, tmp_path):
    done = check_timm_classifier("vit", "drift", images, tmp_path, **{"lora.layers": "last:1"})
    assert done.backbone.targets == 2


def check_timm_classifier(kind, state, images, tmp_path, **changes) -> Exported:
    done = exported(images(kind, **CLASSES | changes), tmp_path, **STATES[state])
    files = png_files(16, 16)
    expected = done.logits(files)
    inputs = normalised(done.batch(files).inputs, [0.4] * 3, [0.2] * 3)
    folder = done.config.model.name.removeprefix("timm:")
    with torch.no_grad():
        found = with_adapter(done, stock_image_model(kind, folder, len(NAMES)))(inputs)
        assert_same(found, expected, f"timm {kind} adapter")
        assert_same(done.load_merged()(inputs), expected, f"timm {kind} merged")
    return done
