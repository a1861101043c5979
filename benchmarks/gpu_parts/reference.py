"""Small models for `correctness.py`, and the clipped sums that their results are compared with.

The reference is stock PEFT in float64 on the CPU: one batch per example, each gradient clipped,
then summed. The same loop on the device and in the checked number type gives the error of rounding
alone.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from models import Batch, Row, llama, minilm, roberta, swin
from torch import Tensor, nn

from lalora_app.adapter.factors import active_names
from lalora_app.blocks.adapters import wire_name
from lalora_app.client.local_round import LocalSettings, apply
from lalora_app.data.encoding import Encoded, EncodedImages, EncodedTexts
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import Backbone
from lalora_app.models.device import autocast, narrow_frozen
from lalora_app.models.forwards import Forward, Pixels, mean_logits, text_logits, timm_logits
from lalora_app.models.frozen_weights import FrozenWeights, base_layers
from lalora_app.models.scores import CLASSIFICATION
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import secure, seeded
from lalora_app.private_step.compiled_engine import CompiledEngine
from lalora_app.private_step.engine import Engine, KernelEngine
from lalora_app.private_step.mechanism import CLIP_MARGIN, clipped_sum
from lalora_app.private_step.step import RandomStreams, private_gradient
from lalora_app.settings.run_config import MethodNumbers, Train

EXAMPLES, TOKENS, CLIP_NORM = 8, 16, 0.5
Grads = Mapping[str, Tensor]  # wire name -> gradient of one example, or a sum of gradients
TRAIN = {
    "local_steps": 2,
    "head_rounds": 0,
    "schedule": "constant",
    "warm_up": 0.0,
    "views": 1,
    "batch_size": 20,
    "sampling_rate": 0.0,
    "union_size": 0,
    "micro_batch": 8,
    "weight_decay": 0.01,
}
RATES = {"lr_a": 0.1, "lr_b": 0.1, "lr_w": 0.1, "lr_head": 0.1, "lr_decay": 1.0}
METHOD_NUMBERS = MethodNumbers(  # la-lora reads none of them
    period=1,
    rank_decay=1.0,
    tail_penalty=0.0,
    fair_weight=0.0,
    flat_radius=0.05,
    residual_rank=0,
    lr_ratio=2.0,
    filter_order=1,
    global_pull=0.0,
    lr_gate=0.01,
    gate_temperature=0.5,
    tasks=2,
    task_rank_decay=1.0,
    merge_tolerance=0.0,
    sparsity=0.1,
    sparsity_steps=1,
    sparsity_spread=0.0,
)


def _with_padding(row: Row) -> Row:
    """Give the texts of a mean-pooled model different lengths, padding and a mask."""

    def losses(model: Callable[..., object], batch: Batch) -> Tensor:
        logits = mean_logits(model, batch["input_ids"], batch["mask"])
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    def make_batch(examples: int, device: torch.device) -> Batch:
        batch = row.make_batch(examples, device)
        lengths = 2 + torch.arange(examples, device=device) % (TOKENS - 1)
        mask = (torch.arange(TOKENS, device=device) < lengths[:, None]).long()
        return batch | {"mask": mask, "input_ids": batch["input_ids"] * mask}

    return Row(row.model, losses, make_batch)


SMALL = {"layers": 2, "width": 64, "heads": 4, "tokens": TOKENS}
MAKERS: dict[str, Callable[[], Row]] = {
    "bert, padded": lambda: _with_padding(minilm(**SMALL)),
    "roberta": lambda: roberta(**SMALL),
    "swin": lambda: swin(32, 4, (2, 2), width=32),
    "llama": lambda: llama(**SMALL),
}
FORWARDS: dict[str, Forward] = {
    "bert, padded": mean_logits,
    "swin": partial(timm_logits, Pixels(32, 32, (0.5,) * 3, (0.5,) * 3)),
}


@cache
def small_model(name: str) -> Row:
    """Build the small model of that name; no trained tensor is zero. Callers copy the model."""
    torch.manual_seed(0)
    row = MAKERS[name]()
    for parameter in trained(row.model).values():
        nn.init.normal_(parameter, std=0.1)
    return row


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by wire name."""
    return {wire_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def joint_norm(tensors: list[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together, in float64."""
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def _single(batch: Batch, i: int) -> Batch:
    """Return a batch of example ``i`` alone, without its padding."""
    one = {key: value[i : i + 1] for key, value in batch.items()}
    if "mask" in one:
        length = int(one["mask"].sum())
        one |= {key: one[key][:, :length] for key in ("input_ids", "mask")}
    return one


def single_gradients(
    row: Row, model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32
) -> list[Grads]:
    """Return the gradient of each example by stock PEFT, from a batch of this example alone."""
    device, found = batch["labels"].device, []
    for i in range(EXAMPLES):
        model.zero_grad()
        with autocast(device, dtype):
            loss = row.losses(model, _single(batch, i)).sum()
        loss.backward()
        found.append({name: p.grad.double().cpu() for name, p in trained(model).items()})
    return found


def exact_gradients(row: Row, batch: Batch) -> list[Grads]:
    """Return the gradient of each example in float64, from a batch on the CPU."""
    wide = {key: v.double() if v.is_floating_point() else v for key, v in batch.items()}
    return single_gradients(row, copy.deepcopy(row.model).double(), wide)


def stock_gradients(row: Row, batch: Batch, dtype: torch.dtype) -> list[Grads]:
    """Return the gradient of each example on the batch's device, in the checked number type."""
    model = copy.deepcopy(row.model).to(batch["labels"].device)
    narrow_frozen(model, dtype)
    return single_gradients(row, model, batch, dtype)


def sum_of_clipped(examples: list[Grads], names: frozenset[str], clip_norm: float) -> Grads:
    """Return the sum over examples, each scaled to a joint norm of at most C."""
    sums = {name: torch.zeros_like(examples[0][name]) for name in names}
    for grads in examples:
        norm = float(joint_norm([grads[name] for name in names]))
        for name in names:
            sums[name] += min(1.0, clip_norm * CLIP_MARGIN / norm) * grads[name]
    return sums


def relative_error(found: Grads, expected: Grads) -> float:
    """Return ‖found - expected‖ / ‖expected‖ over all tensors together."""
    off = [found[name].detach().double().cpu() - expected[name] for name in expected]
    return float(joint_norm(off) / joint_norm(list(expected.values())))


def _engine(model: nn.Module, kernel: str) -> Engine:
    if kernel == "compiled":
        return CompiledEngine(model, trained(model))
    return KernelEngine(model, trained(model), kernel)


class KernelOnDevice:
    """A copy of a model on the batch's device, in one number type, with the engine of one kernel.

    Args:
        row: the model, its losses and batches.
        kernel: the value of ``lora.kernel``.
        batch: the batch of all examples.
        dtype: the number type of the matrix products.
    """

    def __init__(self, row: Row, kernel: str, batch: Batch, dtype: torch.dtype):
        self.dtype, self.row, self.batch = dtype, row, batch
        self.model = copy.deepcopy(row.model).to(batch["labels"].device)
        narrow_frozen(self.model, dtype)
        self.engine = _engine(self.model, kernel)
        self.forward = self.engine.prepare_forward(self._losses)

    def _losses(self, batch: Batch) -> Tensor:
        with autocast(batch["labels"].device, self.dtype):
            return self.row.losses(self.model, batch)

    def clipped_sum(self, names: frozenset[str], clip_norm: float, chosen: list[int]) -> Grads:
        """Return the engine's clipped sum over the chosen examples, for the named tensors."""
        self.engine.activate(names)
        part = {key: value[chosen] for key, value in self.batch.items()}
        grads = self.engine.gradients(lambda: self.forward(part), len(chosen))
        return clipped_sum(grads, clip_norm)

    @torch.no_grad()
    def losses(self, first: int = 0) -> Tensor:
        """Return the losses of a batch of all examples from number ``first`` on."""
        self.engine.activate(frozenset())
        return self.forward({key: value[first:] for key, value in self.batch.items()})


def make_data(name: str) -> Encoded:
    """Return 40 encoded examples for the model of that name."""
    labels = tuple(i % 2 for i in range(40))
    if name == "swin":
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return EncodedImages.of_one_size(pixels, labels)
    return EncodedTexts(tuple(tuple(range(5, 7 + i % 5)) for i in range(40)), labels, pad=0)


def make_backbone(
    name: str, row: Row, kernel: str, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """Build the app's object for a model, without a folder of weights."""
    model = copy.deepcopy(row.model).to(device)
    narrow_frozen(model, dtype)
    engine = _engine(model, kernel)
    layers = base_layers(model)
    return Backbone(
        model,
        CLASSIFICATION,
        FORWARDS.get(name, text_logits),
        list,
        engine,
        device,
        dtype,
        len(layers),
        FrozenWeights(layers),
        {},
    )


def local_settings(optimizer: str) -> LocalSettings:
    """Return the settings of a round of LA-LoRA, which trains B, A, B, A."""
    momentum = 0.5 if optimizer == "sgd" else 0.0
    train = Train(optimizer=optimizer, momentum=momentum, **TRAIN, **RATES)
    return LocalSettings(METHODS["la-lora"], 1, 1, train, METHOD_NUMBERS, CLIP_NORM)


def take_steps(
    backbone: Backbone,
    data: Encoded,
    optimizer: torch.optim.Optimizer,
    count: int,
    after: Callable[[frozenset[str]], None] = lambda names: None,
) -> None:
    """Take private steps of LA-LoRA, and call ``after`` with the trained names of each."""
    method = METHODS["la-lora"]
    streams = RandomStreams(seeded(0, "sampling"), secure())
    for k in range(count):
        names = active_names(backbone.engine.parameters, method.trains(1, k))
        backbone.engine.activate(names)
        noised = private_gradient(
            backbone,
            data,
            reservation=Reservation(Release(0.5, 1.0, 1)),
            clip_norm=CLIP_NORM,
            micro_batch=TRAIN["micro_batch"],
            streams=streams,
        )
        apply(backbone, optimizer, method.postprocess(noised))
        after(names)
