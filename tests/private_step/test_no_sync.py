"""The private step never synchronises host and GPU; checked on the meta device, without a GPU.

A meta tensor has a shape but no values, so reading a value or copying it to the host raises. On the
meta device the step takes the same branches as on a GPU. Synchronisation inside a GPU kernel cannot
be detected in this way.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from conftest import make_config
from helpers.architectures import text_model
from lalora_app.adapter.factors import active_names
from lalora_app.blocks.adapters import wire_name
from lalora_app.client.local_round import LocalSettings, apply, make_optimizer
from lalora_app.data.encoding import EncodedTexts
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import Backbone
from lalora_app.models.forwards import Segmented, mean_logits, text_logits
from lalora_app.models.frozen_weights import FrozenWeights, base_layers
from lalora_app.models.scores import CLASSIFICATION, mean_over_views
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step import attach, kernels, mechanism
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.shared_rows import expand_shared_rows
from lalora_app.private_step.step import RandomStreams, private_gradient

META = torch.device("meta")
TOKENS = tuple(tuple(range(2, 4 + i % 5)) for i in range(40))
DATA = EncodedTexts(TOKENS, tuple(i % 2 for i in range(40)), pad=0)


def tiny_bert(pooling: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    config = BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    kinds = {"mean": BertForTokenClassification, "model": BertForSequenceClassification}
    task = {"mean": "TOKEN_CLS", "model": "SEQ_CLS"}[pooling]
    settings = LoraConfig(task_type=task, r=2, target_modules=["query", "value"])
    return get_peft_model(kinds[pooling](config), settings).eval()


def tiny_deberta() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = text_model("deberta-v3")
    expand_shared_rows(base)
    targets = ["query_proj", "key_proj"]  # they see the positions, which belong to no example
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
    return get_peft_model(base, settings).eval()


def meta_backbone(*, pooling="mean", kernel="fused", dtype=torch.float32, model=None) -> Backbone:
    model = (model or tiny_bert(pooling)).to(dtype).to(META)
    parameters = {wire_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    engine = KernelEngine(model, parameters, kernel)
    forward = {"mean": mean_logits, "model": text_logits}[pooling]
    if model.config.type_vocab_size > 1:
        forward = Segmented(forward, 3)
    bases = FrozenWeights(base_layers(model))
    return Backbone(model, CLASSIFICATION, forward, list, engine, META, dtype, 4, bases, {})


def private_steps(backbone: Backbone) -> None:
    """Run a B step and an A step of LA-LoRA: sampling, clipping, noise, filter, optimiser."""
    config, method = make_config(**{"train.optimizer": "adamw"}), METHODS["la-lora"]
    optimizer = make_optimizer(
        backbone, LocalSettings(method, 1, 1, config.train, config.rule, 0.5), 0.0, {}
    )
    streams = RandomStreams(seeded(0, "sampling"), seeded(0, "noise"))
    for k in range(2):
        names = active_names(backbone.engine.parameters, method.trains(1, k))
        backbone.engine.activate(names)
        noised = private_gradient(
            backbone,
            DATA,
            reservation=Reservation(Release(0.5, 1.0, 1)),
            clip_norm=0.5,
            micro_batch=8,
            streams=streams,
        )
        assert set(noised) == names
        assert all(grad.device == META for grad in noised.values())
        apply(backbone, optimizer, method.postprocess(noised))


def meta_normal(size: int, like: Tensor, seed: int) -> Tensor:
    """Replace the normal draw: the meta device has no generator."""
    assert 0 <= seed < 2**63
    return torch.randn(size, dtype=like.dtype, device=like.device)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Replace the functions that the meta device lacks: generator and autocast."""
    monkeypatch.setattr(mechanism, "_device_normals", meta_normal)
    monkeypatch.setattr(kernels, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(attach, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr("lalora_app.models.backbone.autocast", lambda *_: nullcontext())


@pytest.mark.parametrize("kernel", ["fused", "merged", "plain"])
@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_a_private_step_reads_nothing_from_the_gpu(kernel, pooling):
    backbone = meta_backbone(pooling=pooling, kernel=kernel)
    assert backbone.engine._flat  # as on a GPU
    private_steps(backbone)


@pytest.mark.parametrize("kernel", ["fused", "merged", "plain"])
def test_a_step_with_shared_rows_reads_nothing_either(kernel):
    private_steps(meta_backbone(pooling="model", kernel=kernel, model=tiny_deberta()))


@pytest.mark.parametrize("kernel", ["fused", "merged"])
def test_a_bf16_step_reads_nothing_either_and_sums_in_float32(kernel, monkeypatch):
    seen = []
    whole = mechanism.clipped_sum

    def watched(grads, *rest):
        seen.extend(block.rows.dtype for block in grads.blocks)
        return whole(grads, *rest)

    monkeypatch.setattr("lalora_app.private_step.step.clipped_sum", watched)
    backbone = meta_backbone(kernel=kernel, dtype=torch.bfloat16)
    for parameter in backbone.engine.parameters.values():
        parameter.data = parameter.data.float()
    private_steps(backbone)
    assert set(seen) == {torch.float32}


READS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool((x > 0).any()),
    "copy": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_of_a_value_would_be_seen(read):
    backbone = meta_backbone()
    whole = backbone._train_forward
    backbone._train_forward = lambda *inputs: (READS[read](inputs[0]), whole(*inputs))[1]
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
        private_steps(backbone)


def test_a_mask_of_tokens_would_be_read(monkeypatch):
    """A 2-D mask is read by the model; this is the reason for the prepared 4-D mask."""
    monkeypatch.setattr("lalora_app.models.forwards.whole_mask", lambda mask: mask)
    with pytest.raises(RuntimeError, match="meta"):
        private_steps(meta_backbone())


def test_the_mean_over_views_reads_nothing_from_the_gpu():
    logits, labels = torch.zeros(6, 2, device=META), torch.zeros(3, dtype=torch.long, device=META)
    assert mean_over_views(CLASSIFICATION.losses, logits, labels, 2).shape == (3,)
