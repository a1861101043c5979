"""The kernels of adapted layers: fused, merged, plain and compiled, and GPU dtypes."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.oracle import (
    WAYS,
    Losses,
    assert_engine_is_right,
    assert_equal,
    joint,
    loop_gradients,
    make_engine,
    randomise,
    trained,
    without_engine,
)
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.models.backbone import build
from lalora_app.models.device import narrow_frozen, pick_device, pick_dtype
from lalora_app.models.forwards import whole_mask
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.gradients import OuterProductBlock, PerExampleGrads
from lalora_app.private_step.mechanism import CLIPPINGS, clipped_sum
from lalora_app.private_step.step import RandomStreams, private_gradient

WIDTH, EXAMPLES = 8, 4


class Net(nn.Module):
    """A model (examples, ..., 8) -> (examples, 3): ``calls`` of one LoRA layer and a head."""

    def __init__(self, calls: int = 1, reentrant: bool | None = None):
        super().__init__()
        self.calls, self.reentrant = calls, reentrant
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def body(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = torch.tanh(self.layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            x = self.body(x)
        else:  # a reentrant checkpoint needs an input that requires gradients
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


def adapted(net: nn.Module, **settings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["layer"]} | settings
    return randomise(get_peft_model(net, LoraConfig(modules_to_save=["head"], **settings)))


def losses_of(*shape: int) -> Losses:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, *shape, WIDTH, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 2, 1])

    def losses(model: nn.Module, indices: list[int]) -> Tensor:
        inputs = x[indices].to(next(model.parameters()).dtype)
        return nn.functional.cross_entropy(model(inputs), labels[indices], reduction="none")

    return losses


@pytest.mark.parametrize("shape", [(), (5,), (5, 3)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_lora_layer_of_any_leading_shape_and_number_of_calls(shape, calls):
    assert_engine_is_right(adapted(Net(calls)), losses_of(*shape))


@pytest.mark.parametrize("rank", [1, WIDTH])
def test_the_ends_of_the_rank(rank):
    assert_engine_is_right(adapted(Net(), r=rank), losses_of(5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_modes_of_gradient_checkpointing(reentrant):
    # torch refuses autograd.grad (used by the compiled engine) with a reentrant checkpoint
    ways = [way for way in WAYS if not (reentrant and way[0] == "expanded")]
    assert_engine_is_right(adapted(Net(2, reentrant)), losses_of(5), ways=ways)


@pytest.mark.parametrize(("kernel", "flat"), WAYS)
def test_float32_is_within_5e_6_of_the_float64_loop(kernel, flat):
    model, losses = adapted(Net(2)), losses_of(50)
    expected = loop_gradients(model, losses, list(range(EXAMPLES)))
    single = model.float()
    found = make_engine(single, kernel, flat=flat).gradients(
        lambda: losses(single, list(range(EXAMPLES))), EXAMPLES
    )
    assert_equal(found.dense(), expected, 5e-6)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize(("kernel", "flat"), WAYS)
def test_no_example_moves_the_float32_sum_by_more_than_the_clip_norm(kernel, flat, clipping):
    model, losses = adapted(Net(2)).float(), losses_of(50)
    engine = make_engine(model, kernel, flat=flat)

    def released(indices: list[int], clip_norm: float) -> dict[str, Tensor]:
        grads = engine.gradients(lambda: losses(model, indices), len(indices))
        return clipped_sum(grads, clip_norm, clipping)

    everyone = list(range(EXAMPLES))
    norms = engine.gradients(lambda: losses(model, everyone), EXAMPLES).norms()
    for clip_norm in (float(norms.min()) / 3, float(norms.median())):
        whole = released(everyone, clip_norm)
        for i in everyone:
            fewer = released([j for j in everyone if j != i], clip_norm)
            moved = joint([whole[name] - fewer[name] for name in whole])
            assert moved <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize("kernel", ["fused", "merged"])
def test_bf16_autocast_gives_float32_gradients_as_near_as_the_plain_kernel(kernel):
    model, losses = adapted(Net(2)), losses_of(20)
    expected = loop_gradients(model, losses, list(range(EXAMPLES)))
    error = {}
    for which in ("plain", kernel):
        single = without_engine(model).float()
        engine = make_engine(single, which)
        narrow_frozen(single, torch.bfloat16)

        def autocast_losses(single=single) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return losses(single, list(range(EXAMPLES)))

        found = engine.gradients(autocast_losses, EXAMPLES).dense()
        assert all(grad.dtype == torch.float32 for grad in found.values())
        error[which] = joint([found[name] - expected[name] for name in found])
    whole = joint(list(expected.values()))
    assert 0 < error[kernel] <= max(2 * error["plain"], 0.01 * whole) < 0.1 * whole


def test_narrow_frozen_layers_change_no_bit_of_an_autocast_forward():
    model, losses = adapted(Net(2)).float(), losses_of(5)
    narrowed = copy.deepcopy(model)
    narrow_frozen(narrowed, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses(model, [0, 1]), losses(narrowed, [0, 1]))
    kinds = {name: p.dtype for name, p in narrowed.named_parameters()}
    assert all(
        (dtype == torch.float32) == ("lora" in name or "default" in name)
        for name, dtype in kinds.items()
    )


def test_a_layer_with_dropout_keeps_pefts_arithmetic_and_cannot_be_merged():
    model, losses = adapted(Net(), lora_dropout=0.5), losses_of(5)
    expected = loop_gradients(model, losses, [0, 1])  # no dropout in eval mode
    engine = KernelEngine(model, trained(model), "fused")
    assert "forward" not in vars(model.get_submodule("base_model.model.layer"))
    assert_equal(engine.gradients(lambda: losses(model, [0, 1]), 2).dense(), expected, 1e-12)
    again = without_engine(model)
    with pytest.raises(LayoutError, match=r'lora\.kernel="merged" .*layer, which has LoRA dropout'):
        KernelEngine(again, trained(again), "merged")


@pytest.mark.parametrize("kernel", ["fused", "merged"])
def test_a_switched_off_adapter_is_off(kernel):
    model, x = adapted(Net()), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x)
    KernelEngine(model, trained(model), kernel)
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)


def test_the_merged_weight_follows_its_factors_and_serves_an_evaluation_and_a_step():
    model, losses = adapted(Net()), losses_of(5)
    plain = without_engine(model)
    engine = KernelEngine(model, trained(model), "merged")
    for round_number in range(3):
        with torch.inference_mode():
            torch.testing.assert_close(losses(model, [0, 1]), losses(plain, [0, 1]))
        expected = loop_gradients(plain, losses, [0, 1])
        found = engine.gradients(lambda: losses(model, [0, 1]), 2)
        assert_equal(found.dense(), expected, 1e-12)
        with torch.no_grad():
            for parameters in zip(model.parameters(), plain.parameters(), strict=True):
                for parameter in parameters:
                    parameter.mul_(1.1 + round_number)


def test_dropping_an_example_of_a_one_position_head_leaves_the_models_input_alone():
    x, g = torch.ones(3, 5), torch.ones(3, 2)
    g[1, 0] = float("nan")
    found = clipped_sum(PerExampleGrads((OuterProductBlock("head.weight", g, x),)), 1e6)[
        "head.weight"
    ]
    assert torch.equal(found, torch.full((2, 5), 2.0))
    assert torch.equal(x, torch.ones(3, 5))


def test_gradients_hold_on_to_no_graph():
    model, losses = adapted(Net()), losses_of(5)
    for kernel, flat in WAYS:
        copied = without_engine(model)
        engine = make_engine(copied, kernel, flat=flat)
        grads = engine.gradients(lambda m=copied: losses(m, [0, 1]), 2)
        assert not any(grad.requires_grad for grad in grads.dense().values())


# The compiled form.


def test_the_compiled_form_is_one_graph_and_is_not_compiled_again_for_other_sizes(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = adapted(Net(2)).float()
    engine = make_engine(model, "expanded")
    seen = CompileCounterWithBackend("aot_eager")  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=seen))
    forward = engine.prepare_forward(model)
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for examples, rows in [(4, 5), (6, 7), (3, 9), (8, 4), (5, 11)]:
        x = torch.randn(examples, rows, WIDTH, generator=generator)
        labels = torch.arange(examples) % 3

        def losses(of, x=x, labels=labels) -> Tensor:
            return nn.functional.cross_entropy(of(x), labels, reduction="none")

        eager = engine.gradients(lambda f=losses: f(model), examples).dense()
        compiled = engine.gradients(lambda f=losses: f(forward), examples).dense()
        assert_equal(compiled, {name: grad.double() for name, grad in eager.items()}, 5e-6)
        graphs.append(seen.frame_count)
    assert graphs[-1] == graphs[1] <= 2


def test_models_of_many_ranks_are_compiled_in_one_process(no_compiler):
    for rank in (1, 2, 3, 4):  # 24 graphs, where torch compiles one function at most 8 times
        exact = adapted(Net(), r=rank)
        model = copy.deepcopy(exact).float()
        engine = make_engine(model, "expanded")
        forward = engine.prepare_forward(lambda x, labels, of=model: _cross_entropy(of, x, labels))
        for active in (_kinds(exact, "A"), _kinds(exact, "B"), _kinds(exact, "AB")):
            engine.activate(active)
            for examples in (4, 1, 3):
                batch = torch.randn(examples, 5, WIDTH), torch.arange(examples) % 3
                found = engine.gradients(lambda f=forward, b=batch: f(*b), examples).dense()

                def losses(of, chosen, batch=batch) -> Tensor:
                    x, labels = batch
                    return _cross_entropy(of, x[chosen].double(), labels[chosen])

                expected = loop_gradients(exact, losses, list(range(examples)))
                assert found.keys() == active
                assert_equal(found, {name: expected[name] for name in active}, 5e-6)


def _cross_entropy(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), labels, reduction="none")


def _kinds(model: nn.Module, factors: str) -> frozenset[str]:
    """The names of the named factors and of the head."""
    parts = ["head", *(f".lora_{factor}." for factor in factors)]
    return frozenset(name for name in trained(model) if any(part in name for part in parts))


@pytest.fixture
def no_compiler(monkeypatch):
    """Use torch.compile's graph capture only, which needs no C++ compiler."""
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)


@pytest.mark.parametrize(
    "kernel", ["fused", "merged", "plain", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_every_kernel_of_the_config_releases_the_same(tiny, no_compiler, kernel, pooling):
    released = {}
    for which in ("plain", kernel):
        config = tiny(**{"lora.kernel": which, "model.pooling": pooling})
        backbone, start = build(config)
        rng = np.random.default_rng(0)
        backbone.load({n: rng.normal(0, 0.5, a.shape).astype("f4") for n, a in start.items()})
        data = backbone.encode(split(config.data)[0])
        backbone.engine.activate(frozenset(name for name in start if ".lora_A." not in name))
        released[which] = private_gradient(
            backbone,
            EncodedTexts(data.tokens[:40], data.labels[:40], data.pad),
            reservation=Reservation(Release(0.5, 1.0, 1)),
            clip_norm=0.1,
            micro_batch=8,
            streams=RandomStreams(seeded(0, "sampling"), seeded(0, "noise")),
        )
    assert set(released[kernel]) == set(released["plain"])
    for name, grad in released["plain"].items():
        torch.testing.assert_close(released[kernel][name], grad, rtol=1e-4, atol=1e-6)


# On a GPU.


def test_float32_is_not_tf32():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert pick_device("cpu") == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bf16_is_the_default_of_a_gpu_and_float32_of_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [pick_dtype("auto", device) for device in (cpu, gpu)] == [torch.float32, torch.bfloat16]
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("float32", gpu) == torch.float32


def test_a_ready_mask_means_the_same_as_a_mask_of_tokens(tiny):
    config = tiny()
    backbone, _ = build(config)
    data = backbone.encode(split(config.data)[0])
    lengths = sorted(range(len(data)), key=lambda i: len(data.tokens[i]))
    batch = data.batch([lengths[0], lengths[-1]])
    assert not batch.mask.all()
    assert backbone.model.config._attn_implementation == "sdpa"
    both = [
        backbone.model(input_ids=batch.inputs, attention_mask=mask).logits
        for mask in (batch.mask, whole_mask(batch.mask))
    ]
    torch.testing.assert_close(*both)
