"""``model.prefix-cache``: gradients from kept states are those of the whole model.

In float64 the two routes agree to 1e-10; kept in bfloat16, to the precision of bfloat16.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.architectures import save_image_model, save_text_model
from helpers.model_checks import LANGUAGE_BATCH, TEXTS, pixels, refusal
from helpers.oracle import assert_equal, joint, randomise
from lalora_app.blocks.kept_states import StatesInMemory
from lalora_app.blocks.prefix import Prefix
from lalora_app.blocks.prefix_checks import Probe, check_prefix
from lalora_app.blocks.with_states import WithStates, size_of
from lalora_app.data.encoding import Batch, Encoded, EncodedImages, EncodedTexts
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.scores import LANGUAGE_MODEL
from lalora_app.private_step.mechanism import clipped_sum
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

CACHE = {"lora.layers": "last:1", "model.prefix-cache": True}  # of two blocks
TEXT_KINDS = ["bert", "roberta", "distilbert", "llama"]
WIDE_KINDS = [
    "electra",
    "deberta-v3",
    "modernbert",
    "gpt2",
    "mistral",
    "qwen3",
    "gemma2",
    "opt",
    "phi",
    "bloom",
    "falcon",
    "gpt-neox",
]
IMAGES = EncodedImages.of_one_size(pixels(4, 16), (0, 1, 1, 0))
STATES: dict[str, Encoded] = {"texts": TEXTS, "images": IMAGES, "language": LANGUAGE_BATCH}


def never(batch: Batch) -> Tensor:
    raise AssertionError("all states are kept")


@pytest.fixture
def a_model(tiny, images, texts, tmp_path):
    """A config with the cache: of a text, image or language model."""

    def make(kind: str, what: str, **changes) -> Config:
        keys = CACHE | changes
        if what == "language":
            return texts("llama", **keys)
        if kind.startswith("timm:"):
            return images(kind.removeprefix("timm:"), **keys)
        if what == "images":
            return images(save_image_model(kind, tmp_path / kind), **keys)
        # larger numbers than the usual 0.02, so that texts differ in their logits
        name = save_text_model(kind, tmp_path / kind, initializer_range=0.3)
        return tiny(**{"model.name": name} | keys)

    return make


def wide_forward(model: nn.Module, batch: Batch, what: str) -> Tensor:
    """Losses in float64; the app's own forward passes round logits to float32."""
    if what == "images":
        out = model(batch.inputs.double() / 255)
        out = getattr(out, "logits", out)
    else:
        mask = {} if batch.mask is None else {"attention_mask": batch.mask}
        out = model(input_ids=batch.inputs, **mask).logits
    if what == "language":
        return LANGUAGE_MODEL.losses(out, batch.labels)
    return nn.functional.cross_entropy(out, batch.labels, reduction="none")


def wide_gradients(backbone: Backbone, batch: Batch, what: str) -> dict[str, Tensor]:
    def losses() -> Tensor:
        with backbone.prefix.starting_from(batch.states):
            return wide_forward(backbone.model, batch, what)

    return backbone.engine.gradients(losses, len(batch.labels)).dense()


CASES = [
    *((kind, "texts") for kind in TEXT_KINDS),
    *(pytest.param(kind, "texts", marks=pytest.mark.wide) for kind in WIDE_KINDS),
    ("vit", "images"),
    ("timm:vit", "images"),
    pytest.param("dinov2", "images", marks=pytest.mark.wide),
    pytest.param("timm:beit", "images", marks=pytest.mark.wide),
    ("llama", "language"),
]


@pytest.mark.parametrize(("kind", "what"), CASES)
@pytest.mark.usefixtures("wide_softmax")
def test_gradients_from_kept_states_are_those_of_the_whole_model(kind, what, a_model):
    """When states are computed, when they are kept, and when only some of them are."""
    backbone, _ = build(a_model(kind, what))
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    randomise(backbone.model)
    data = STATES[what]

    @torch.no_grad()
    def compute(batch: Batch) -> Tensor:
        return backbone.prefix.states(lambda: wide_forward(backbone.model, batch, what))

    memory = StatesInMemory()
    cached = WithStates(data, backbone.prefix, compute, memory, torch.float64)
    frozen = replace(cached, compute=never)
    rounds = [(cached, [1, 2]), (frozen, [2, 1]), (cached, [0, 1, 2]), (frozen, [0, 2, 1])]
    for source, indices in rounds:
        for width in (0, 12):
            expected = wide_gradients(backbone, data.batch(indices, width), what)
            found = wide_gradients(backbone, source.batch(indices, width), what)
            assert_equal(found, expected, 1e-10)
    sizes = [size_of(data, backbone.prefix, index, torch.float64) for index in range(3)]
    assert memory.size_in_bytes() == sum(sizes) + 3 * 32  # and a key for each


def random_adapter(config: Config) -> Backbone:
    backbone, _ = build(config)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    torch.manual_seed(0)
    for parameter in backbone.engine.parameters.values():
        nn.init.normal_(parameter, std=0.3)
    return backbone


def clipped(backbone: Backbone, data: Encoded, indices: list[int]) -> dict[str, Tensor]:
    """The app's own clipped sum, as a private step computes it."""
    sums: dict[str, Tensor] = {}
    for batch in data.micro_batches(indices, 2):
        grads = backbone.engine.gradients(lambda b=batch: backbone.losses(b), len(batch.labels))
        for name, total in clipped_sum(grads, 0.5).items():
            sums[name] = sums[name] + total if name in sums else total
    return sums


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return joint([found[n] - e for n, e in expected.items()]) / joint(list(expected.values()))


@pytest.mark.parametrize(
    ("kind", "what"), [("bert", "texts"), ("timm:vit", "images"), ("llama", "language")]
)
def test_clipped_sums_agree_to_the_precision_of_bfloat16(kind, what, a_model):
    backbone, data = random_adapter(a_model(kind, what)), STATES[what]
    cached = WithStates(data, backbone.prefix, backbone.states, StatesInMemory())
    indices = list(range(len(data)))
    plain, first = clipped(backbone, data, indices), clipped(backbone, cached, indices)
    again = clipped(backbone, replace(cached, compute=never), indices)
    assert 0 < relative(first, plain) < 2**-6  # it is used, and near
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_narrower_type_moves_the_sum_further(dtype, a_model):
    """So what is left of the difference is rounding: none in float32, 2^-11 in float16."""
    backbone = random_adapter(a_model("bert", "texts"))
    cached = WithStates(TEXTS, backbone.prefix, backbone.states, StatesInMemory(), dtype)
    off = relative(*(clipped(backbone, data, [0, 1, 2, 3]) for data in (cached, TEXTS)))
    assert off < (1e-6 if dtype == torch.float32 else 2**-9)


def test_the_blocks_below_compute_once_per_example(a_model):
    backbone = random_adapter(a_model("bert", "texts"))
    calls: list[tuple[str, int]] = []
    for name, module in backbone.model.named_modules():
        if name.endswith(("layer.0.intermediate", "layer.1.intermediate")):
            which = name.split(".")[-2]
            module.register_forward_hook(lambda _, x, y, w=which: calls.append((w, len(x[0]))))
    cached = WithStates(TEXTS, backbone.prefix, backbone.states, StatesInMemory())
    backbone.losses(cached.batch([0, 1], 8))
    assert calls == [("0", 2), ("1", 2)]  # the adapted block is left out when states are computed
    calls.clear()
    backbone.losses(cached.batch([1, 2, 0], 8))
    assert calls == [("0", 1), ("1", 3)]
    calls.clear()
    backbone.logits(TEXTS.batch([0, 1]))  # an evaluation computes everything
    assert calls == [("0", 2), ("1", 2)]


def test_states_hold_the_true_tokens_alone(a_model):
    """Kept in a batch that is padded to 16, given to one that is padded to 8."""
    backbone = random_adapter(a_model("bert", "texts"))
    cached = WithStates(TEXTS, backbone.prefix, backbone.states, StatesInMemory(), torch.float32)
    wide, narrow = cached.batch([1, 2], 12).states, cached.batch([1, 2], 8).states
    assert wide.shape[1] == 12
    assert not wide[0, 3:].any()
    assert not wide[1, 8:].any()
    assert torch.equal(narrow, wide[:, :8])
    alone = backbone.states(TEXTS.batch([1]))
    torch.testing.assert_close(alone[0], wide[0, :3], rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_from_kept_states(a_model):
    keys = {"model.checkpointing": True}
    plain, again = (random_adapter(a_model("bert", "texts", **k)) for k in ({}, keys))
    sums = []
    for backbone in (plain, again):
        cached = WithStates(TEXTS, backbone.prefix, backbone.states, StatesInMemory())
        sums += [clipped(backbone, cached, [0, 1, 2, 3]) for _ in range(2)]
    assert all(relative(other, sums[0]) < 1e-5 for other in sums[1:])


# --- the entry of something else is never used ------------------------------------------------


def other_weights(config: Config) -> Config:
    """The same model with one number in its lowest block changed."""
    file = Path(config.model.name) / "model.safetensors"
    weights = load_file(file)
    (name,) = [n for n in weights if n.endswith("layer.0.attention.self.query.weight")]
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    return replace(config, seed=config.seed + 1)  # so that the process builds it anew


def test_states_of_other_weights_are_not_used(a_model):
    config, memory = a_model("bert", "texts"), StatesInMemory()
    one = random_adapter(config)
    WithStates(TEXTS, one.prefix, one.states, memory).batch([0, 1, 2, 3])
    other = random_adapter(other_weights(config))
    assert other.prefix.fingerprint != one.prefix.fingerprint
    cached = WithStates(TEXTS, other.prefix, other.states, memory)
    off = relative(clipped(other, cached, [0, 1, 2, 3]), clipped(other, TEXTS, [0, 1, 2, 3]))
    assert off < 2**-6
    with pytest.raises(AssertionError, match="all states are kept"):
        replace(cached, compute=never, kept=StatesInMemory()).batch([0])


def test_states_of_another_example_are_not_used(a_model):
    """At the same place, of the same length, and of the same label."""
    backbone, memory = random_adapter(a_model("bert", "texts")), StatesInMemory()
    WithStates(TEXTS, backbone.prefix, backbone.states, memory).batch([0, 1, 2, 3])
    others = EncodedTexts(tuple(row[::-1] for row in TEXTS.tokens), TEXTS.labels, pad=0)
    cached = WithStates(others, backbone.prefix, backbone.states, memory)
    off = relative(clipped(backbone, cached, [0, 1, 2, 3]), clipped(backbone, others, [0, 1, 2, 3]))
    assert off < 2**-6


def test_images_of_the_same_bytes_and_another_shape_are_others(a_model):
    backbone = random_adapter(a_model("timm:vit", "images"))
    memory = StatesInMemory()
    flat = pixels(1, 16).reshape(1, 3, 8, 32)
    tall = flat.reshape(1, 3, 32, 8)
    expected = backbone.states(EncodedImages.of_one_size(tall, (0,)).batch([0]))
    for stack in (flat, tall):
        data = EncodedImages.of_one_size(stack, (0,))
        cached = WithStates(data, backbone.prefix, backbone.states, memory, torch.float32)
        found = cached.batch([0]).states
    assert torch.equal(found, expected)


def test_what_moves_the_base_moves_nothing_below(a_model):
    """Folds and perturbations change adapted layers only, so every method may use the cache."""
    backbone, start = build(a_model("bert", "texts"))
    assert all(".layer.1." in name for name in backbone.frozen_weights.names)
    batch = TEXTS.batch([0, 1, 2, 3])
    before, logits = backbone.states(batch), backbone.logits(batch)
    drift = {name: array + 0.5 for name, array in start.items() if ".lora_" in name}
    backbone.load(start, drift)
    with backbone.frozen_weights.perturbed(torch.ones_like):
        assert torch.equal(backbone.states(batch), before)
        assert not torch.allclose(backbone.logits(batch), logits, rtol=1e-2)
    backbone.load(start)


# --- what cannot be divided -------------------------------------------------------------------

START = "model.prefix-cache=true must be false for "


def test_adapters_in_the_first_block_are_one_line(tiny):
    assert refusal(tiny(**CACHE | {"lora.layers": "all"})) == (
        f"{START}adapters in the first block: the cache cannot leave out any block; adapt the "
        'last blocks only, such as lora.layers="last:2"'
    )
    assert refusal(tiny(**CACHE | {"lora.layers": "last:2"})).startswith(START)
    line = refusal(tiny(**{"model.prefix-cache": True, "lora.targets": "pooler.dense"}))
    assert line.startswith(f"{START}adapters outside of the blocks")


def test_a_compiled_pass_is_one_line(tiny):
    assert refusal(tiny(**CACHE | {"lora.kernel": "compiled"})) == (
        f'{START}lora.kernel="compiled": a compiled pass has no place to start from the cache; '
        '"fused" has'
    )


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_a_model_of_stages_is_one_line(kind, images):
    line = refusal(images(kind, **{"model.prefix-cache": True}))
    assert line.startswith(f'{START}model.name="timm:')
    assert line.endswith(
        "it has no single stack of equal blocks, such as the layers of BERT, so the cache cannot "
        "divide it"
    )


def test_tensors_that_train_below_are_one_line(tiny, tmp_path):
    """The checkpoint lacks them, so they train whole."""
    folder = Path(save_text_model("bert", tmp_path))
    weights = load_file(folder / "model.safetensors")
    kept = {n: w for n, w in weights.items() if "layer.0.output.dense" not in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    line = refusal(tiny(**{"model.name": str(folder)} | CACHE))
    assert line == (
        f'{START}model.name="{folder}": what it computes below its first adapted block is not '
        "constant: layers there train whole, or it draws random numbers"
    )


class Toy(nn.Module):
    """Two blocks; the first one's output may pass by the second, be random or be longer."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.kind = kind
        self.head = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first = self.blocks[0](nn.functional.dropout(x, training=self.kind == "random"))
        if self.kind == "more tokens":
            first = torch.cat([first, first[:, :1]], 1)
        last = self.blocks[1](first)[:, : mask.shape[1]]
        if self.kind == "zero head":  # its logits show nothing until it trains
            return self.head(last.sum(1) + first.sum(1))
        if self.kind == "padding is seen":
            return last.sum(1) + first.sum(1)
        return (last * mask[..., None]).sum(1)


TOYS = {
    "plain": None,
    "more tokens": r"hidden states of the shape \(2, 4, 4\) are not \(examples, tokens, features\)",
    "random": "is not constant: layers there train whole, or it draws random numbers",
    "zero head": "it computes other logits, so the cache cannot divide it",
    "padding is seen": "it computes other logits, so the cache cannot divide it",
}


@pytest.mark.parametrize(("kind", "reason"), TOYS.items())
def test_a_model_that_cannot_be_divided_is_one_line(kind, reason, tiny):
    """Kept states are constant, and have zeros in the place of padding."""
    model, x = Toy(kind), torch.randn(2, 3, 4)
    prefix = Prefix(tuple(model.blocks), 1, "identity")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    trained = [*model.blocks[1].parameters(), *model.head.parameters()]
    before = [p.detach().clone() for p in trained]

    def check() -> None:
        logits = partial(model, x, mask)
        check_prefix(prefix, Probe(logits, mask, tiny().model, torch.float32), trained)

    if reason is None:
        check()
    else:
        with pytest.raises(ConfigError, match=reason):
            check()
    assert all(torch.equal(a, b) for a, b in zip(trained, before, strict=True))
