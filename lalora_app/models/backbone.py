"""The frozen backbone with its LoRA layers: built once per process, checked, evaluated."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lalora_app.adapter.factors import Adapter
from lalora_app.adapter.head_start import with_head_start
from lalora_app.blocks.adapters import wire_name, with_adapters, with_whole_weights
from lalora_app.blocks.prefix import FrozenPart
from lalora_app.blocks.prefix_checks import Probe, divided
from lalora_app.data.encoding import Batch, Encoded
from lalora_app.data.examples import Examples
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.table import METHODS
from lalora_app.models.base import Base
from lalora_app.models.device import autocast, narrow_frozen, pick_device, pick_dtype, to_device
from lalora_app.models.fingerprint import fingerprint, states_identity
from lalora_app.models.forwards import Forward
from lalora_app.models.frozen_weights import FrozenWeights, base_layers
from lalora_app.models.pretrained import revision
from lalora_app.models.scores import Metrics, Task, mean_over_views, task_of_run
from lalora_app.models.targets import check_rank, choose_targets, stack_of
from lalora_app.models.timm_models import load_timm
from lalora_app.models.transformers_models import load_transformers
from lalora_app.private_step.attach import LayoutError
from lalora_app.private_step.compiled_engine import CompiledEngine
from lalora_app.private_step.engine import Engine, KernelEngine
from lalora_app.private_step.layout_check import check_layout
from lalora_app.private_step.reparametrised_engine import Reparametrisation, ReparametrisedEngine
from lalora_app.settings.errors import ConfigError, first_line
from lalora_app.settings.names import TIMM
from lalora_app.settings.run_config import Config, Lora, Model


@dataclass
class Backbone:
    """A PEFT model with its engine, task and encoder.

    The same instance serves every client of a process; only the adapter is loaded anew.

    Attributes:
        model: the PEFT model.
        task: the losses and metrics of its logits.
        forward: (model, inputs, mask) -> logits.
        encode: examples -> encoded examples.
        engine: the gradients of single examples, and the trainable tensors by wire name.
        device: the device of the model.
        dtype: the type of its matrix products.
        targets: the number of adapted layers.
        frozen_weights: the frozen weights of the adapted layers.
        fingerprint: the SHA-256 of each part of the base model, the same for all ranks.
        processor: the tokenizer of texts, or the ``Pixels`` of images; None: not known.
        prefix: the frozen part of the model, for ``model.prefix-cache``; None: no cache.
        resting: initial values of the tensors that the method leaves out of its adapter.
    """

    model: nn.Module
    task: Task
    forward: Forward
    encode: Callable[[Examples], Encoded]
    engine: Engine
    device: torch.device
    dtype: torch.dtype
    targets: int
    frozen_weights: FrozenWeights
    fingerprint: Mapping[str, str]
    processor: Any = None
    prefix: FrozenPart | None = None
    resting: Adapter = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let the engine prepare the forward pass of training; evaluation uses it unchanged."""
        self._train_forward = self.engine.prepare_forward(self._logits)

    def adapter(self) -> Adapter:
        """Return a copy of all tensors but the resting ones, in float32 on the CPU."""
        own = {n: p.detach() for n, p in self.engine.parameters.items() if n not in self.resting}
        return {name: tensor.float().cpu().numpy().copy() for name, tensor in own.items()}

    @torch.no_grad()
    def load(self, adapter: Adapter, drift: Adapter | None = None) -> None:
        """Overwrite all trainable tensors, and set the base to ``W0 + B·A`` of the drift.

        Args:
            adapter: tensors with the backbone's own names and shapes; without ``resting``, if any.
            drift: the change of the frozen weights; None: no change.
        """
        whole = self.resting | adapter
        for name, parameter in self.engine.parameters.items():
            parameter.copy_(torch.from_numpy(whole[name]))
        self.engine.write_to_model()
        self.frozen_weights.set_drift(drift or {})

    def reparametrised(self, theta: Adapter, effective: Reparametrisation) -> "Backbone":
        """Return the same model, trained by ``theta``: its factors are ``effective(theta)``."""
        view = copy.copy(self)
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in theta.items()}
        view.engine = ReparametrisedEngine(self.engine, tensors, effective)
        return view

    def _logits(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.forward(self.model, inputs, mask)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, in float32."""
        return self._logits(*self._inputs(batch))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        mask = None if batch.mask is None else to_device(batch.mask, self.device)
        return to_device(batch.inputs, self.device), mask

    def losses(self, batch: Batch) -> Tensor:
        """Return (examples,): the loss of each example on its own, the mean over its views."""
        with self._starting_from(batch.states):
            logits = self._train_forward(*self._inputs(batch))
        labels = to_device(batch.labels, self.device)
        return mean_over_views(self.task.losses, logits, labels, batch.views)

    def _starting_from(self, states: Tensor | None) -> AbstractContextManager[None]:
        if self.prefix is None or states is None:
            return nullcontext()
        return self.prefix.starting_from(to_device(states, self.device))

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Return (examples, tokens, features): the output of the frozen part.

        Raises:
            ValueError: without ``model.prefix-cache``.

        Privacy: the result is as private as the examples.
        """
        if self.prefix is None:
            raise ValueError("model.prefix-cache=false: the model is not divided")
        return self.prefix.states(partial(self.logits, batch))

    @torch.inference_mode()
    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """Return ``accuracy`` and ``balanced_accuracy``, or ``accuracy`` and ``perplexity``."""
        count, device = self.task.count, self.device
        counts = [count(self.logits(batch), to_device(batch.labels, device)) for batch in batches]
        return self.task.metrics(sum(counts[1:], start=counts[0]))


def _load(model: Model, num_labels: int) -> Base:
    if model.name.startswith(TIMM):
        return load_timm(model, num_labels)
    return load_transformers(model, num_labels)


def _engine(model: nn.Module, parameters: dict[str, nn.Parameter], kernel: str) -> Engine:
    if kernel == "compiled":
        return CompiledEngine(model, parameters)
    return KernelEngine(model, parameters, kernel)


Built = tuple[Backbone, Adapter]
Trains = Literal["factors", "weights", "head"]


def _build(
    model: Model, lora: Lora, num_labels: int, seed: int, trains: Trains
) -> tuple[Backbone, Batch]:
    device = pick_device(model.device)
    # Privacy: A (Kaiming) and the head are drawn here from the run's seed, without data.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = _load(model, num_labels)
        targets = choose_targets(base, model, lora)
        stack = stack_of(base) if model.prefix_cache else None
        check_rank(base, targets, lora.rank)
        adapt = with_whole_weights if trains == "weights" else partial(with_adapters, lora=lora)
        adapted = adapt(base.model, targets=targets, trained=base.trained, task_type=base.task_type)
    # Before the move and the narrowing: sites with a GPU and sites without one must agree.
    hashes = fingerprint(adapted, base.preprocessing)
    adapted.to(device)
    trainable = {wire_name(n): p for n, p in adapted.named_parameters() if p.requires_grad}
    dtype = pick_dtype(model.dtype, device)
    narrow_frozen(adapted, dtype)
    backbone = Backbone(
        model=adapted,
        task=base.task,
        forward=base.forward,
        encode=base.encode,
        engine=_engine(adapted, trainable, lora.kernel),
        device=device,
        dtype=dtype,
        targets=len(targets.paths),
        frozen_weights=FrozenWeights(base_layers(adapted)),
        fingerprint=hashes,
        processor=base.processor,
    )
    if model.prefix_cache:
        _, mask = backbone._inputs(base.probe)
        probe = Probe(partial(backbone.logits, base.probe), mask, model, dtype)
        known, head = states_identity(model, hashes, dtype), trains == "head"
        backbone.prefix = divided(adapted, stack, targets, probe, known, lora=lora, head_alone=head)
    return backbone, base.probe


def _check(backbone: Backbone, probe: Batch) -> None:
    """Check the layout on random inputs, without data."""

    def losses(rows: list[int]) -> Tensor:
        mask = None if probe.mask is None else probe.mask[rows]
        return backbone.losses(Batch(probe.inputs[rows], mask, probe.labels[rows]))

    check_layout(backbone.engine, losses, len(probe.labels))


def _check_or_refuse(backbone: Backbone, probe: Batch, model: Model, lora: Lora) -> None:
    """Check the layout; name the keys of a model that fails.

    Raises:
        ConfigError: if the model fails on random inputs, or torch.compile refuses it.
        LayoutError: if the model gives no per-example gradients.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        _check(backbone, probe)
    except LayoutError as error:
        raise LayoutError(
            f'lora.targets="{lora.targets}" does not fit model.name="{model.name}": {error}'
        ) from error
    except TorchDynamoException as error:
        raise ConfigError(
            f'lora.kernel="{lora.kernel}" must be another one for this model, which torch.compile '
            f"refuses: {first_line(error)}"
        ) from error
    except Exception as error:  # whatever a model may raise on inputs like those of training
        raise ConfigError(
            f'model.name="{model.name}" fails on random inputs: {first_line(error)}'
        ) from error


@lru_cache(maxsize=1)
def _by_rank(
    model: Model, files: str, lora: Lora, num_labels: int, seed: int
) -> dict[tuple[int, float, Trains], Built]:
    """Return this process's cache of one model by rank; other files or another model replace it."""
    return {}


def _checked(model: Model, lora: Lora, num_labels: int, seed: int, trains: Trains) -> Built:
    any_rank, files = replace(lora, rank=1, alpha=1.0, ranks="none"), revision(model.name)
    built = _by_rank(model, files, any_rank, num_labels, seed)
    key = (lora.rank, lora.alpha, trains)
    if key not in built:
        backbone, probe = _build(model, lora, num_labels, seed, trains)
        start = backbone.adapter()
        _check_or_refuse(backbone, probe, model, lora)
        built[key] = backbone, start
    return built[key]


def _num_labels(config: Config) -> int:
    """Return the number of classes, which must be known; of a language model it has no effect."""
    if not config.data.class_names and config.model.task != "causal-lm":
        raise ConfigError('data.labels="auto" must be replaced by the class names of the data')
    return len(config.data.class_names)


def build(config: Config) -> Built:
    """Return the process's backbone and the initial adapter of the run's method.

    A is Kaiming, B and W are zero, the head as ``model.head`` says, drawn from the run's seed.

    Raises:
        ConfigError: if the model, its targets, the rank, the device or the method do not fit.
        LayoutError: if this model gives no per-example gradients.
    """
    method, rule, lora = method_of(config), config.rule, config.lora
    width = method.width(lora.rank, rule)  # at the same scale α/r
    own = replace(lora, rank=width, alpha=lora.alpha * width / lora.rank)
    if method.whole:  # the keys have no effect
        own = replace(lora, rank=1, alpha=1.0, kernel="plain")
    # Without the cache the head alone can share the model of other methods.
    head_alone = METHODS[config.method].head_only and config.model.prefix_cache
    trains: Trains = "weights" if method.whole else "head" if head_alone else "factors"
    backbone, plain = _checked(config.model, own, _num_labels(config), config.seed, trains)
    plain = with_head_start({name: array.copy() for name, array in plain.items()}, config.model)
    start = method.start(plain, rule)
    view = copy.copy(backbone)  # the model is shared with other runs
    view.task = task_of_run(view.task, config)
    if effective := method.effective:
        return view.reparametrised(start, lambda theta: effective(theta, rule)), start
    view.resting = {name: x for name, x in plain.items() if name not in start}
    return view, start
