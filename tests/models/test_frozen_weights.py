"""The frozen weights: noise of rows, a step's perturbation and its restoration, a run's drift."""

import copy
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import make_config
from helpers.oracle import trained, without_engine
from lalora_app.adapter.factors import Adapter
from lalora_app.blocks.adapters import wire_name
from lalora_app.client import local_round
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.methods.table import METHODS
from lalora_app.methods.weight_noise import row_scaled_noise
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.frozen_weights import FrozenWeights, base_layers
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seed_of, seeded
from lalora_app.private_step import step

KERNELS = ["fused", "merged", "plain"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Noise of rows.


@pytest.mark.parametrize("progress", [0.1, 0.5, 1.0])
def test_a_rows_noise_is_relative_to_the_row_and_grows_over_the_run(progress):
    n, radius = 20_000, 0.3
    weight = torch.randn(3, n, generator=generator()) * torch.tensor([[1.0], [10.0], [0.01]])
    noise = row_scaled_noise(weight, progress, radius, generator(1))
    ramp = math.sin(math.pi * progress / 2) ** 2  # = (1 - cos(pi * progress)) / 2
    for row, own in zip(noise, weight, strict=True):
        norm = math.sqrt(sum(float(w) ** 2 for w in own))
        wanted = ramp * radius * norm / math.sqrt(n)
        assert float(row.std()) == pytest.approx(wanted, rel=0.03)  # its error is 0.5 %
        assert abs(float(row.mean())) < 5 * wanted / math.sqrt(n)
        assert float(row.norm()) == pytest.approx(ramp * radius * norm, rel=0.03)
    rows = np.corrcoef(noise.numpy())
    assert np.abs(rows - np.eye(3)).max() < 5 / math.sqrt(n)


def test_at_the_start_of_the_run_without_radius_or_for_a_zero_row_there_is_no_noise():
    weight = torch.randn(4, 6, generator=generator())
    assert not row_scaled_noise(weight, 0.0, 0.05, generator()).any()
    assert not row_scaled_noise(weight, 0.7, 0.0, generator()).any()
    weight[2] = 0
    noise = row_scaled_noise(weight, 0.7, 0.05, generator())
    assert noise.any(dim=1).tolist() == [True, True, False, True]


def test_noise_is_its_generators_to_the_bit_and_leaves_the_weight_alone():
    weight = torch.randn(4, 6, generator=generator())
    before = weight.clone()
    first, again, other = (
        row_scaled_noise(weight, 0.5, 0.05, generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not (first == other).any()
    assert torch.equal(weight, before)


def test_no_perturbation_can_see_data():
    for method in METHODS.values():
        if method.perturb is not None:
            names = list(inspect.signature(method.perturb).parameters)
            assert names == ["weight", "progress", "radius", "generator"]


# The frozen weights of a model.


def random_adapter(start: Adapter, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.5, x.shape).astype(np.float32) for n, x in start.items()}


@pytest.fixture
def prepared(tiny):
    """A backbone by kernel, its adapter random; restored afterwards, as it is kept."""
    used = []

    def prepare(kernel: str = "fused", **changes) -> tuple[Backbone, Adapter]:
        config = tiny(
            **{
                "method": "dp-lora",
                "model.pooling": "mean",
                "lora.kernel": kernel,
                "lora.alpha": 3.0,
            }
            | changes
        )
        model, start = build(config)
        used.append((model, start))
        adapter = random_adapter(start)
        model.load(adapter)
        return model, adapter

    yield prepare
    for model, start in used:
        model.load(start)


@pytest.fixture
def data(tiny) -> EncodedTexts:
    config = tiny(**{"model.pooling": "mean"})
    model, _ = build(config)
    encoded = model.encode(split(config.data)[0])
    return EncodedTexts(encoded.tokens[:8], encoded.labels[:8], encoded.pad)


def weights_of(model) -> dict[str, Tensor]:
    return {
        name: layer.base_layer.weight.detach().clone() for name, layer in base_layers(model).items()
    }


def narrowed(backbone: Backbone, dtype: torch.dtype) -> tuple[FrozenWeights, torch.nn.Module]:
    """Bases of a copy of the model whose frozen weights are of a type."""
    model = without_engine(backbone.model)
    for layer in base_layers(model).values():
        layer.base_layer.weight.data = layer.base_layer.weight.data.to(dtype)
    return FrozenWeights(base_layers(model)), model


def assert_bits(model, expected: dict[str, Tensor]) -> None:
    found = weights_of(model)
    assert found.keys() == expected.keys()
    assert len(expected) == 4
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_block_every_weight_has_moved_by_the_change_and_then_is_back(prepared, dtype):
    bases, model = narrowed(prepared()[0], dtype)
    before = weights_of(model)
    seen: list[Tensor] = []

    def change(weight: Tensor) -> Tensor:
        seen.append(weight.clone())
        return torch.full_like(weight, 0.01 * len(seen)) * weight

    with bases.perturbed(change):
        for weight, old, computed, k in zip(
            weights_of(model).values(), before.values(), seen, range(1, 5), strict=True
        ):
            wanted = (old.double() + 0.01 * k * computed.double()).to(dtype)
            tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(weight, wanted, **tolerance)
            assert not torch.equal(weight, old)
    assert_bits(model, before)
    for (name, old), computed in zip(before.items(), seen, strict=True):
        layer = base_layers(model)[name]
        factors = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert layer.scaling["default"] == 1.5
        expected = old.double() + 1.5 * factors  # what it computes with
        torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-5)
        assert computed.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exception_within_the_block_or_half_way_into_it_restores_every_weight(prepared, dtype):
    bases, model = narrowed(prepared()[0], dtype)
    before = weights_of(model)

    def fail_inside() -> None:
        with bases.perturbed(torch.ones_like):
            moved = weights_of(model)
            assert not any(torch.equal(moved[name], weight) for name, weight in before.items())
            raise ArithmeticError("inside")

    with pytest.raises(ArithmeticError, match="inside"):
        fail_inside()
    assert_bits(model, before)
    calls = []

    def broken(weight: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("half way")
        return torch.ones_like(weight)

    with pytest.raises(ArithmeticError, match="half way"), bases.perturbed(broken):
        pass
    assert_bits(model, before)


def test_without_a_change_the_block_does_nothing(prepared):
    model = prepared()[0]
    before, versions = weights_of(model.model), [p._version for p in model.model.parameters()]
    with model.frozen_weights.perturbed(None):
        assert_bits(model.model, before)
    assert [p._version for p in model.model.parameters()] == versions


# The drift.


def drift_of(adapter: Adapter, rank: int, seed: int, layers: int = 4) -> Adapter:
    rng, drift = np.random.default_rng(seed), Adapter()
    for b in [name for name in adapter if ".lora_B." in name][:layers]:
        a = b.replace("lora_B", "lora_A")
        shapes = {b: (adapter[b].shape[0], rank), a: (rank, adapter[a].shape[1])}
        drift |= {n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    return drift


def moved_by(weights: dict[str, Tensor], drift: Adapter) -> dict[str, Tensor]:
    """W0 + B·A in float64, entry by entry over the rank."""
    moved = {}
    for name, weight in weights.items():
        total = weight.double().clone()
        if name in drift:
            b, a = drift[name], drift[name.replace("lora_B", "lora_A")]
            for j in range(b.shape[1]):
                total += torch.from_numpy(np.outer(b[:, j].astype(np.float64), a[j]))
        moved[name] = total
    return moved


@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_is_always_from_the_first_weight_and_an_empty_drift_is_back_there(prepared, dtype):
    backbone, adapter = prepared()
    bases, model = narrowed(backbone, dtype)
    before = weights_of(model)
    # Growing and shrinking ranks, fewer layers, and the same again: nothing of the last remains.
    for rank, seed, layers in [(1, 0, 4), (5, 1, 4), (2, 2, 2), (2, 2, 2), (3, 3, 3)]:
        drift = drift_of(adapter, rank, seed, layers)
        given = copy.deepcopy(drift)
        bases.set_drift(drift)
        expected = moved_by(before, drift)
        for name, weight in weights_of(model).items():
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(weight, expected[name].to(dtype), **tolerance)
            assert torch.equal(weight, before[name]) == (name not in drift)
        assert all(np.array_equal(drift[name], array) for name, array in given.items())
    bases.set_drift({})
    assert_bits(model, before)


def test_a_shake_of_moved_weights_comes_back_to_the_moved_ones(prepared):
    backbone, adapter = prepared()
    bases, model = narrowed(backbone, torch.float32)
    before = weights_of(model)
    bases.set_drift(drift_of(adapter, 2, 0))
    moved = weights_of(model)
    with bases.perturbed(torch.ones_like):
        pass
    assert_bits(model, moved)
    bases.set_drift({})
    assert_bits(model, before)


def product(adapter: Adapter, b: str) -> Tensor:
    left, right = (torch.from_numpy(adapter[n]).double() for n in (b, b.replace("_B", "_A")))
    return left @ right


def dense(backbone: Backbone, weights: dict[str, Tensor], adapter: Adapter) -> Backbone:
    """A model of PEFT's own arithmetic: W0 + s·B·A in its base weights, and zeros in its B."""
    model = without_engine(backbone.model)
    with torch.no_grad():
        for name, layer in base_layers(model).items():
            own = weights[name].double() + layer.scaling["default"] * product(adapter, name)
            layer.base_layer.weight.copy_(own)
            layer.lora_B["default"].weight.zero_()
    return replace(backbone, model=model)


@torch.no_grad()
def logits(backbone: Backbone, data: EncodedTexts) -> Tensor:
    return backbone.logits(data.batch(list(range(len(data)))))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_evaluation_sees_the_moved_and_the_shaken_weights(prepared, data, kernel):
    backbone, adapter = prepared(kernel)
    before = weights_of(backbone.model)
    first = logits(backbone, data)  # a merged kernel has now formed its weight
    for rank, seed in [(2, 0), (3, 1)]:
        drift = drift_of(adapter, rank, seed)
        backbone.frozen_weights.set_drift(drift)
        expected = logits(dense(backbone, moved_by(before, drift), adapter), data)
        found = logits(backbone, data)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - first).abs().max() > 1e-2
        with backbone.frozen_weights.perturbed(lambda weight: 0.5 * weight):
            shaken = logits(backbone, data)
        stretched = {
            name: weight + 0.5 * (weight + 1.5 * product(adapter, name))
            for name, weight in moved_by(before, drift).items()
        }
        wanted = logits(dense(backbone, stretched, adapter), data)
        torch.testing.assert_close(shaken, wanted, rtol=1e-4, atol=1e-4)
        assert (shaken - found).abs().max() > 1e-2
        assert torch.equal(logits(backbone, data), found)
    backbone.load(adapter, drift)
    assert torch.equal(logits(backbone, data), found)
    backbone.load(adapter)
    assert_bits(backbone.model, before)
    assert torch.equal(logits(backbone, data), first)


# A step of Flat-LoRA.


def mean_gradient(backbone: Backbone, data: EncodedTexts) -> dict[str, Tensor]:
    """Plain autograd, one example a batch."""
    sums: dict[str, Tensor] = {}
    for i in range(len(data)):
        backbone.model.zero_grad()
        backbone.losses(data.batch([i])).sum().backward()
        for name, parameter in trained(backbone.model).items():
            key = wire_name(name)
            sums[key] = sums.get(key, 0) + parameter.grad.double() / len(data)
    return sums


@pytest.mark.parametrize("kernel", KERNELS)
def test_flat_lora_takes_every_gradient_at_weights_shaken_by_the_seeds_own_noise(
    prepared, data, kernel
):
    backbone, adapter = prepared(kernel)
    before = weights_of(backbone.model)
    steps, radius, rate = 2, 2.0, 0.5
    config = flat_tables(steps, radius, rate)
    local = local_round.LocalSettings(METHODS["flat-lora"], 3, 4, *config, math.inf, seed=11)
    result = local_round.run_round(
        backbone,
        data,
        adapter,
        {},
        local=local,
        reservation=Reservation(Release(1.0, 0.0, steps)),
        streams=step.RandomStreams(seeded(0, "sampling"), seeded(0, "noise")),
    )
    assert_bits(backbone.model, before)
    own = dict(adapter)
    for k in range(steps):
        seed = seed_of(local.seed, "perturbation", k) % 2**63
        assert local.progress(k) == pytest.approx((2 * steps + k) / (4 * steps))
        noise, drawn = {}, generator(seed)
        for name, weight in before.items():
            computed = (weight.double() + 1.5 * product(own, name)).float()
            noise[name] = row_scaled_noise(computed, (2 * steps + k) / (4 * steps), radius, drawn)
        plain = replace(backbone, model=without_engine(backbone.model))
        with torch.no_grad():
            for name, layer in base_layers(plain.model).items():
                layer.base_layer.weight.add_(noise[name])
            for name, parameter in trained(plain.model).items():
                parameter.copy_(torch.from_numpy(own[wire_name(name)]))
        for name, grad in mean_gradient(plain, data).items():
            own[name] = (own[name] - rate * grad.numpy()).astype(np.float32)
    for name, array in own.items():
        np.testing.assert_allclose(result[name], array, rtol=1e-3, atol=1e-4)
    plain_result = unshaken(backbone, data, adapter, local)
    assert max(np.abs(plain_result[n] - x).max() for n, x in own.items()) > 1e-2


def flat_tables(steps: int, radius: float, rate: float):
    """The tables ``train`` and ``rule`` of a run: SGD of one rate for all tensors."""
    rates = {f"train.lr-{part}": rate for part in ("a", "b", "head")}
    changes = {"train.local-steps": steps, "rule.flat-radius": radius, "train.lr-decay": 1.0}
    config = make_config(**rates | changes)
    return config.train, config.rule


def unshaken(backbone: Backbone, data: EncodedTexts, adapter: Adapter, local) -> Adapter:
    return local_round.run_round(
        backbone,
        data,
        adapter,
        {},
        local=replace(local, method=METHODS["dp-lora"]),
        reservation=Reservation(Release(1.0, 0.0, local.train.local_steps)),
        streams=step.RandomStreams(seeded(0, "sampling"), seeded(0, "noise")),
    )


def test_every_client_round_and_step_has_noise_of_its_own_and_repeats_it(prepared):
    config = flat_tables(4, 0.05, 0.1)
    backbone, _ = prepared()
    weight = torch.randn(4, 6, generator=generator())

    def noise(seed: int, k: int) -> Tensor:
        local = local_round.LocalSettings(METHODS["flat-lora"], 2, 2, *config, 1.0, seed=seed)
        return local_round._perturbation(backbone, local, k)(weight)

    assert torch.equal(noise(1, 2), noise(1, 2))
    assert not (noise(1, 2) == noise(1, 3)).any()
    assert not (noise(1, 2) == noise(2, 2)).any()
