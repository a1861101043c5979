"""Per-example gradients, compared with autograd on single examples in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import SHARED, make_config
from helpers.oracle import (
    TOLERANCE,
    Losses,
    assert_engine_is_right,
    assert_equal,
    blocks,
    joint,
    loop_gradients,
    randomise,
    trained,
    without_engine,
)
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import Examples, split
from lalora_app.models.backbone import build
from lalora_app.models.forwards import masked_mean
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.layout_check import check_layout
from lalora_app.private_step.mechanism import clipped_sum

MINILM = SHARED / "models" / "minilm-l6-h384"


# Real architectures.


def text_losses(data: EncodedTexts, pooling: str) -> Losses:
    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        batch = data.batch(indices)  # padded to the longest text; a single example has no padding
        logits = model(input_ids=batch.inputs, attention_mask=batch.mask).logits
        logits = masked_mean(logits, batch.mask) if pooling == "mean" else logits
        return nn.functional.cross_entropy(logits, batch.labels, reduction="none")

    return losses


def text_model(config, std: float = 0.3) -> nn.Module:
    backbone, _ = build(config)
    backbone.engine.activate(frozenset(backbone.engine.parameters))
    return randomise(without_engine(backbone.model), std)


@pytest.fixture
def bert(tiny):
    """Return the tiny BERT and its losses on four texts of different lengths."""

    def make(pooling: str = "model"):
        config = tiny(**{"model.pooling": pooling, "lora.targets": "query,value,dense"})
        backbone, _ = build(config)
        data = backbone.encode(split(config.data)[0])
        tokens = tuple(data.tokens[i][: 2 + 2 * i] for i in range(4))
        assert len({len(row) for row in tokens}) == 4
        return text_model(config), text_losses(
            EncodedTexts(tokens, (0, 1, 0, 1), data.pad), pooling
        )

    return make


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_bert_with_padding_and_masks(bert, pooling):
    assert_engine_is_right(*bert(pooling))


def test_float32_under_bf16_autocast_still_gives_float32_gradients(bert):
    model, losses = bert()
    expected = loop_gradients(without_engine(model), losses, [0, 1, 2, 3])
    model = model.float()
    engine = KernelEngine(model, trained(model))

    def autocast_losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, [0, 1, 2, 3])

    found = engine.gradients(autocast_losses, 4).dense()
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert_equal(found, expected, 0.1)


@pytest.fixture(scope="module")
def swin():
    """Return a Swin of two stages with LoRA on attention; every second block shifts its windows."""
    from peft import LoraConfig, get_peft_model
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    base = SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=3,
    )
    settings = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=r".*attn\.(qkv|proj)",
        modules_to_save=["head.fc"],
    )
    model = randomise(get_peft_model(base, settings))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])

    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        return nn.functional.cross_entropy(
            model(images[indices]), labels[indices], reduction="none"
        )

    return model, losses


def test_swin_with_shifted_windows(swin):
    model, losses = swin
    model = copy.deepcopy(model)
    shifts = [block.attn_mask is not None for layer in model.layers for block in layer.blocks]
    assert shifts == [False, True, False, True]
    assert {name.split(".")[-3] for name in trained(model)} >= {"lora_A", "lora_B"}
    assert_engine_is_right(model, losses)


def test_the_layout_check_passes_swin_and_leaves_its_parameters_alone(swin):
    model, losses = swin
    model = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    engine = KernelEngine(model, trained(model))
    engine.activate(frozenset(list(before)[:1]))
    check_layout(engine, lambda rows: losses(model, rows), 3)
    assert set(trained(model)) == set(before)
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())


def window_gradients(model: nn.Module, layer: nn.Linear, losses: Losses, i: int) -> Tensor:
    """Return (windows, out, in): the gradient of one image's loss, per window."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["x"] = inputs[0].detach()
        output.register_hook(lambda g: seen.update(g=g))

    handle = layer.register_forward_hook(keep)
    losses(model, [i]).sum().backward()
    handle.remove()
    return torch.einsum("wno,wni->woi", seen["g"], seen["x"])


def test_an_image_is_clipped_as_one_and_not_by_its_windows(swin):
    model, losses = copy.deepcopy(swin[0]), swin[1]
    name = next(n for n in trained(model) if "qkv.lora_B" in n)
    layer = model.get_submodule(name.removesuffix(".weight"))
    windows = window_gradients(model, layer, losses, 0)
    norms = windows.flatten(1).norm(dim=1)
    assert len(norms) == 16
    clip_norm = float(norms.median())
    by_window = (windows * (clip_norm / norms).clamp(max=1)[:, None, None]).sum(0)
    assert by_window.norm() > 1.5 * clip_norm  # the sensitivity if every window was clipped alone

    engine = KernelEngine(model, trained(model))
    grads = engine.gradients(lambda: losses(model, [0, 1]), 2).dense()
    image = grads[name][:1]
    torch.testing.assert_close(image[0], windows.sum(0))
    assert (norms - image.norm()).abs().min() > 1e-3 * norms.max()
    assert clipped_sum(blocks({name: image}), clip_norm)[name].norm() <= clip_norm
    for example in range(2):
        whole = blocks({n: g[example : example + 1] for n, g in grads.items()})
        assert joint(list(clipped_sum(whole, clip_norm).values())) <= clip_norm


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.is_dir(), reason=f"needs the MiniLM of {MINILM}")
def test_the_real_minilm():
    config = make_config(**{"model.name": str(MINILM), "model.device": "cpu", "lora.rank": 4})
    texts = [
        "ok",
        "see you later",
        "free entry in a weekly competition, text WIN to claim your prize",
        "are you coming home for dinner tonight?",
    ]
    backbone, _ = build(config)
    ids = backbone.encode(Examples(tuple(texts), (0, 0, 1, 0))).tokens
    assert len({len(row) for row in ids}) == 4
    data = EncodedTexts(ids, (0, 0, 1, 0), pad=0)
    losses = text_losses(data, config.model.pooling)
    assert_engine_is_right(text_model(config, std=0.03), losses)


# Single properties, on small models.


class Small(nn.Module):
    """A model (examples, ..., 6) -> (examples, 3): one layer, called several times, and a head."""

    def __init__(self, calls: int = 1):
        super().__init__()
        self.calls = calls
        self.first = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def mixed(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = torch.tanh(self.first(self.mixed(x)))
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


class WindowMajor(Small):
    """A model with rows in the order (windows, examples), grouped by window, not by example."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.tanh(self.first(x.transpose(0, 1).contiguous()))  # (windows, examples, 6)
        return self.head(turned.mean(0))


class Normalised(Small):
    """A model with BatchNorm in train mode between the trained layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x).mean(1)))


class NormalisedFirst(Normalised):
    """A model with BatchNorm in train mode below all trained layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.norm(x.mean(1)))))


def small_losses(*shape: int) -> Losses:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, *shape, 6, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 2, 1])

    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(x[indices]), labels[indices], reduction="none")

    return losses


@pytest.mark.parametrize("shape", [(), (5,), (5, 7)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("calls", [1, 3])
def test_any_leading_shape_any_number_of_calls_and_a_biased_head(shape, calls):
    model = randomise(Small(calls))
    assert set(trained(model)) == {"first.weight", "head.weight", "head.bias"}
    assert_engine_is_right(model, small_losses(*shape))


def test_opacus_agrees():
    from opacus import GradSampleModule

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    x = torch.randn(5, 7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 1, 0])

    def losses(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(x).mean(1), labels, reduction="none")

    theirs = GradSampleModule(copy.deepcopy(model), batch_first=True, loss_reduction="sum")
    losses(theirs).sum().backward()
    expected = {n.removeprefix("_module."): p.grad_sample for n, p in theirs.named_parameters()}
    engine = KernelEngine(model, trained(model))
    found = engine.gradients(lambda: losses(model), 5).dense()
    assert set(found) == set(expected)
    assert_equal(found, expected, TOLERANCE)


def test_an_inactive_layer_keeps_no_activation():
    model, x = randomise(Small()), torch.randn(4, 5, 6, dtype=torch.float64)
    engine = KernelEngine(model, trained(model))
    kept: list[int] = []
    entered: list[Tensor] = []  # the head's input, stored by no other function
    model.head.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    def head_input_is_kept(*names: str) -> bool:
        kept.clear()
        engine.activate(frozenset(names))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            grads = engine.gradients(lambda: model(x).square().sum(1), 4)
            assert set(grads.dense()) == set(names)
        return entered[-1].data_ptr() in kept

    assert head_input_is_kept("first.weight", "head.weight")
    assert not head_input_is_kept("first.weight", "head.bias")


def test_rows_that_do_not_divide_into_examples_are_refused():
    model, losses = randomise(Small()), small_losses()
    engine = KernelEngine(model, trained(model))
    with pytest.raises(LayoutError, match=r"rows of shape \(4,\) do not divide into 3 examples"):
        engine.gradients(lambda: losses(model, [0, 1, 2, 3])[:3], 3)


def test_an_active_parameter_that_takes_no_part_is_named():
    model, losses = randomise(Small(calls=0)), small_losses()
    engine = KernelEngine(model, trained(model))
    with pytest.raises(LayoutError, match=r"first\.weight is active but took no part"):
        engine.gradients(lambda: losses(model, [0, 1]), 2)
    engine.activate(frozenset({"head.weight"}))
    grads = engine.gradients(lambda: losses(model, [0, 1]), 2)
    assert set(grads.dense()) == {"head.weight"}


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(9, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_trained_layer_that_is_no_linear_is_refused_at_once(layer):
    model = nn.Sequential(nn.Linear(6, 6), layer)
    with pytest.raises(LayoutError, match=f"1 trains but is a {type(layer).__name__}"):
        KernelEngine(model, trained(model))
    layer.requires_grad_(False)
    assert set(KernelEngine(model, trained(model)).parameters) == {"0.weight", "0.bias"}


def checked(model: nn.Module, *shape: int) -> None:
    losses = small_losses(*shape)
    engine = KernelEngine(model, trained(model))
    check_layout(engine, lambda rows: losses(model, rows), 3)


@pytest.mark.parametrize("shape", [(), (4,), (4, 2)])
def test_the_layout_check_passes_honest_models_and_restores_them(shape):
    model = randomise(Small(calls=2))
    before = copy.deepcopy(model.state_dict())
    checked(model, *shape)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_layout_check_finds_gradients_of_factors_that_start_at_zero():
    model = randomise(Small())
    nn.init.zeros_(model.head.weight)  # zero like B, so the first layer gets no gradient
    checked(model, 4)
    assert not model.head.weight.any()


def test_the_layout_check_catches_rows_grouped_by_window_and_names_the_layer():
    with pytest.raises(LayoutError, match=r"first\.weight: .*not grouped by"):
        checked(randomise(WindowMajor()), 6)


def test_the_layout_check_catches_batchnorm_and_names_a_layer_below_it():
    model = randomise(Normalised()).train()
    model.norm.requires_grad_(False)
    with pytest.raises(LayoutError, match=r"first\.weight: .*mixes examples"):
        checked(model, 4)
    checked(model.eval(), 4)  # fixed statistics do not mix examples


def test_the_layout_check_catches_batchnorm_below_every_trained_layer():
    model = randomise(NormalisedFirst()).train()
    model.norm.requires_grad_(False)
    with pytest.raises(LayoutError):
        checked(model, 4)


def test_the_layout_check_restores_the_parameters_of_a_model_that_it_refuses():
    model = randomise(WindowMajor())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LayoutError):
        checked(model, 6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
