"""The top Hessian eigenvalue, against the dense float64 Hessian of a plain copy of the model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from conftest import WORDS
from helpers.oracle import randomise, trained, without_engine
from lalora_app.blocks.adapters import wire_name
from lalora_app.data.encoding import Batch, EncodedImages, EncodedSequences, EncodedTexts
from lalora_app.diagnosis.curvature import top_hessian_eigenvalue
from lalora_app.models.backbone import Backbone, build
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.compiled_engine import CompiledEngine
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.reparametrised_engine import ReparametrisedEngine
from lalora_app.settings.run_config import Config

TOKENS = tuple(tuple(2 + (i * j) % 13 for j in range(1, 4 + i % 5)) for i in range(1, 9))
TEXTS = EncodedTexts(TOKENS, (0, 1, 1, 0, 1, 0, 0, 1), pad=0)
WHOLE = TEXTS.batch(range(8))
UNEQUAL = [TEXTS.batch([0, 1, 2, 3, 4]), TEXTS.batch([5, 6]), TEXTS.batch([7])]
ALL = 1000  # steps: more than the tiny model has entries


def tiny_bert() -> nn.Module:
    """One layer of width 8, rank 1 on query and value: 50 entries, random, in float64."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    settings = LoraConfig(task_type="SEQ_CLS", r=1, lora_alpha=3, target_modules=["query", "value"])
    return randomise(get_peft_model(BertForSequenceClassification(config), settings), std=0.5)


def text_logits(model: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """In the model's own type, where lalora_app.tasks gives float32."""
    return model(input_ids=inputs, attention_mask=mask).logits


@pytest.fixture
def tiny_backbone(tiny) -> Callable[..., Backbone]:
    """Factory of backbones around the tiny BERT, by kernel."""

    def make(kernel: str = "fused") -> Backbone:
        model = tiny_bert()
        named = {wire_name(name): p for name, p in trained(model).items()}
        expanded = kernel == "expanded"
        engine = CompiledEngine(model, named) if expanded else KernelEngine(model, named, kernel)
        return replace(build(tiny())[0], model=model, forward=text_logits, engine=engine)

    return make


@functools.cache
def dense_hessian() -> np.ndarray:
    """Of the mean loss of all eight texts, by a model without engine and with eager attention."""
    plain = tiny_bert()
    plain.config._attn_implementation = "eager"
    shapes = {name: p.shape for name, p in trained(plain).items()}

    def mean_loss(entries: Tensor) -> Tensor:
        parts = entries.split([shape.numel() for shape in shapes.values()])
        named = {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
        inputs = {"input_ids": WHOLE.inputs, "attention_mask": WHOLE.mask}
        logits = functional_call(plain, named, kwargs=inputs).logits
        return cross_entropy(logits, WHOLE.labels)

    entries = torch.cat([p.detach().flatten() for p in trained(plain).values()])
    return torch.autograd.functional.hessian(mean_loss, entries).numpy()


def top_eigenvalue() -> float:
    return float(np.linalg.eigvalsh(dense_hessian())[-1])


# --- the value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["fused", "merged", "plain", "expanded"])
def test_it_is_the_dense_eigenvalue_whatever_the_kernel(kernel, tiny_backbone):
    found = top_hessian_eigenvalue(tiny_backbone(kernel), [WHOLE], steps=ALL)
    assert found == pytest.approx(top_eigenvalue(), rel=1e-9)
    assert type(found) is float


def test_every_example_counts_the_same_in_batches_of_any_size(tiny_backbone):
    backbone = tiny_backbone()
    expected = top_hessian_eigenvalue(backbone, [WHOLE], steps=3)
    empty = Batch(WHOLE.inputs[:0], WHOLE.mask[:0], WHOLE.labels[:0])
    for batches in (UNEQUAL, iter(UNEQUAL), [empty, *UNEQUAL]):
        assert top_hessian_eigenvalue(backbone, batches, steps=3) == pytest.approx(expected)


def test_the_default_steps_are_enough_and_few_steps_stay_below(tiny_backbone):
    """No eigenvalue here stands out by more than a factor of two."""
    backbone, expected = tiny_backbone(), top_eigenvalue()
    assert top_hessian_eigenvalue(backbone, [WHOLE]) == pytest.approx(expected, rel=1e-4)
    for seed in range(3):
        found = [top_hessian_eigenvalue(backbone, [WHOLE], steps=n, seed=seed) for n in (1, 3, 9)]
        assert found[0] < found[1] < found[2] <= expected * (1 + 1e-9)
    assert found[0] < 0.9 * expected


def test_the_seed_is_that_of_the_start(tiny_backbone):
    backbone = tiny_backbone()
    one, two = ([top_hessian_eigenvalue(backbone, [WHOLE], steps=2, seed=s)] for s in (0, 1))
    assert one != two
    assert one == [top_hessian_eigenvalue(backbone, [WHOLE], steps=2, seed=0)]


def test_the_gradient_of_the_private_step_changes_at_that_rate(tiny_backbone):
    """Along the top eigenvector, by central differences of what the engine itself gives."""
    backbone = tiny_backbone()
    sizes = [p.numel() for p in trained(backbone.model).values()]
    vector = torch.from_numpy(np.linalg.eigh(dense_hessian())[1][:, -1].copy())
    parts = vector.split(sizes)

    def slope(step: float) -> float:
        tensors = backbone.engine.parameters.items()
        kept = {name: p.detach().clone() for name, p in tensors}
        with torch.no_grad():
            for (_, p), part in zip(tensors, parts, strict=True):
                p += step * part.view_as(p)
            grads = _gradients(backbone)
            for name, p in tensors:
                p.copy_(kept[name])
        pairs = zip(tensors, parts, strict=True)
        return float(sum((grads[name].flatten() * part).sum() for (name, _), part in pairs)) / 8

    rate = (slope(1e-4) - slope(-1e-4)) / 2e-4
    assert top_hessian_eigenvalue(backbone, [WHOLE], steps=ALL) == pytest.approx(rate, rel=1e-6)


@torch.enable_grad()
def _gradients(backbone: Backbone) -> dict[str, Tensor]:
    grads = backbone.engine.gradients(lambda: backbone.losses(WHOLE), len(WHOLE.labels))
    return grads.weighted_sum(torch.ones(len(WHOLE.labels)))


def test_it_is_in_the_models_own_tensors_where_a_method_trains_others(tiny_backbone):
    backbone = tiny_backbone()
    expected = top_hessian_eigenvalue(backbone, [WHOLE], steps=3)
    names = [name for name in backbone.engine.parameters if "lora_B" not in name]
    theta = {name: torch.zeros(3) for name in [*names, "lora_gate"]}
    backbone.engine = ReparametrisedEngine(backbone.engine, theta, lambda own: own)
    assert top_hessian_eigenvalue(backbone, [WHOLE], steps=3) == expected


# --- real backbones ------------------------------------------------------------------------------

SEQUENCES = EncodedSequences(TOKENS)
PIXELS = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
IMAGES = EncodedImages.of_one_size(PIXELS.to(torch.uint8), (0, 1, 0))
Logits = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of model: its config, public examples, and how stock code calls it in float64."""

    config: dict[str, object]
    batch: Batch
    logits: Logits


def bert_logits(model: nn.Module, batch: Batch) -> Tensor:
    """A token behind a separator is of the second text: the words of these texts are random."""
    end = WORDS.index("[SEP]")
    second = [[int(end in row[:i]) for i in range(len(row))] for row in batch.inputs.tolist()]
    tokens = {"input_ids": batch.inputs, "attention_mask": batch.mask}
    return model(**tokens, token_type_ids=torch.tensor(second)).logits


@pytest.fixture
def kinds(tiny_llama, tiny_timm) -> dict[str, Kind]:
    llama = {
        "model.name": tiny_llama,
        "model.task": "causal-lm",
        "data.label-column": "none",
        "data.partitioner": "iid",
    }
    vit = {"model.name": f"timm:{tiny_timm['vit']}", "model.task": "image-classification"}
    vit |= {"model.image-size": 16, "model.image-resize": 16, "data.input-column": "image"}
    return {
        "bert": Kind({}, WHOLE, bert_logits),
        "llama": Kind(llama, SEQUENCES.batch([0, 3, 4]), lambda m, b: m(input_ids=b.inputs).logits),
        "vit": Kind(
            vit, IMAGES.batch([0, 1, 2]), lambda m, b: m((b.inputs.double() / 255 - 0.4) / 0.2)
        ),
    }


def randomised(config: Config) -> Backbone:
    """B at zero would hide most of the Hessian."""
    backbone, _ = build(config)
    torch.manual_seed(0)
    for parameter in backbone.engine.parameters.values():
        nn.init.normal_(parameter, std=0.3)
    return backbone


def second_difference(backbone: Backbone, kind: Kind, seed: int) -> float:
    """vᵀHv at Lanczos' own start v, by mean losses in float64 and no derivative at all."""
    plain = without_engine(backbone.model).double()
    size = sum(p.numel() for p in backbone.engine.parameters.values())
    start = torch.from_numpy(np.random.default_rng(seed).standard_normal(size))
    parts = (start / start.norm()).split([p.numel() for p in trained(plain).values()])

    @torch.no_grad()
    def loss(step: float) -> float:
        named = {
            n: p + step * v.view_as(p)
            for (n, p), v in zip(trained(plain).items(), parts, strict=True)
        }
        module = Called(plain, kind.logits)
        inside = {f"model.{name}": tensor for name, tensor in named.items()}
        logits = functional_call(module, inside, (kind.batch,))
        return float(backbone.task.losses(logits, kind.batch.labels).mean())

    # Fourth order, with a wide step: some layers compute in float32 whatever they are given.
    step = 0.1
    weights = {-2: -1, -1: 16, 0: -30, 1: 16, 2: -1}
    return sum(w * loss(i * step) for i, w in weights.items()) / (12 * step**2)


class Called(nn.Module):
    """A model and how it is called."""

    def __init__(self, model: nn.Module, logits: Logits):
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, batch: Batch) -> Tensor:
        return self.logits(self.model, batch)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_one_step_is_the_loss_curvature_along_the_start(kind, checkpointing, kinds, tiny):
    changes = {"model.attention": "sdpa", "model.checkpointing": checkpointing}
    backbone = randomised(tiny(**kinds[kind].config | changes))
    names = [wire_name(name) for name in trained(without_engine(backbone.model))]
    assert names == list(backbone.engine.parameters)  # the order in which entries are laid out
    for seed in (0, 1):
        found = top_hessian_eigenvalue(backbone, [kinds[kind].batch], steps=1, seed=seed)
        expected = second_difference(backbone, kinds[kind], seed)
        assert found == pytest.approx(expected, rel=2e-3)


def test_bf16_is_right_to_a_few_per_cent(tiny):
    found = {}
    for dtype in ("float32", "bfloat16"):
        backbone = randomised(tiny(**{"model.dtype": dtype}))
        found[dtype] = top_hessian_eigenvalue(backbone, [WHOLE], steps=2)
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=5e-2)
    assert found["bfloat16"] != found["float32"]


# --- what it leaves ------------------------------------------------------------------------------


def state_of(backbone: Backbone) -> list[object]:
    """All that a private step reads, bits and identities."""
    parameters = backbone.engine.parameters
    return [
        {name: tensor.numpy().tobytes() for name, tensor in backbone.model.state_dict().items()},
        {name: (id(p), p.requires_grad) for name, p in backbone.model.named_parameters()},
        {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
        {p: m.__dict__.get("forward") for p, m in backbone.model.named_modules()},
        {path: module.training for path, module in backbone.model.named_modules()},
    ]


@pytest.mark.parametrize("kernel", ["fused", "merged", "plain", "expanded"])
@pytest.mark.parametrize("active", ["lora_A", "lora_B", "nothing"])
def test_everything_is_afterwards_as_it_was_whatever_was_active(kernel, active, tiny_backbone):
    other, backbone = tiny_backbone(kernel), tiny_backbone(kernel)
    expected = top_hessian_eigenvalue(other, [WHOLE], steps=3)
    assert all(parameter.grad is None for parameter in other.model.parameters())
    backbone.engine.activate(frozenset(n for n in backbone.engine.parameters if active in n))
    for parameter in backbone.engine.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(backbone)
    assert top_hessian_eigenvalue(backbone, [WHOLE], steps=3) == expected
    assert state_of(backbone) == before


def test_the_engine_gives_the_same_gradients_afterwards(tiny_backbone):
    backbone = tiny_backbone()
    before = _gradients(backbone)
    top_hessian_eigenvalue(backbone, [WHOLE], steps=2)
    after = _gradients(backbone)
    assert set(before) == set(after) == set(backbone.engine.parameters)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_may_be_asked_for_where_gradients_are_off(tiny_backbone):
    backbone = tiny_backbone()
    expected = top_hessian_eigenvalue(backbone, [WHOLE], steps=2)
    with torch.no_grad():
        assert top_hessian_eigenvalue(backbone, [WHOLE], steps=2) == expected


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], [Batch(WHOLE.inputs[:0], None, WHOLE.labels[:0])]])
def test_no_example_is_refused(batches, tiny_backbone):
    with pytest.raises(ValueError, match="0 examples: there must be at least 1"):
        top_hessian_eigenvalue(tiny_backbone(), batches)


def test_an_error_inside_leaves_everything_as_it_was(tiny_backbone):
    backbone = tiny_backbone()
    backbone.engine.activate(frozenset())
    before = state_of(backbone)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        top_hessian_eigenvalue(backbone, [WHOLE], steps=0)
    wrong = Batch(WHOLE.inputs, WHOLE.mask, WHOLE.labels + 7)
    with pytest.raises(IndexError):
        top_hessian_eigenvalue(backbone, [wrong])
    assert state_of(backbone) == before


def test_an_engine_of_another_function_is_refused(tiny_backbone):
    backbone = tiny_backbone()
    value = backbone.model.base_model.model.bert.encoder.layer[0].attention.self.value
    fused = value.forward
    value.forward = type(fused)(lambda layer, x: 2 * fused(x), value)
    before = state_of(backbone)
    with pytest.raises(LayoutError, match="off the engine's, and must be within"):
        top_hessian_eigenvalue(backbone, [WHOLE])
    assert state_of(backbone) == before


def test_a_tensor_that_takes_no_part_is_refused(tiny_backbone):
    backbone = tiny_backbone()
    spare = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    backbone.model.register_parameter("spare", spare)
    backbone.engine.parameters["spare"] = spare
    with pytest.raises(LayoutError, match="spare is active but took no part"):
        top_hessian_eigenvalue(backbone, [WHOLE])


def test_a_loss_that_is_not_finite_is_refused(tiny_backbone):
    backbone = tiny_backbone()
    parameter = next(iter(backbone.engine.parameters.values()))
    with torch.no_grad():
        parameter.fill_(torch.nan)
    with pytest.raises(LayoutError, match="nan off"):
        top_hessian_eigenvalue(backbone, [WHOLE])
