"""Parametrisations (gates, magnitudes, projections): products, gradients, clipping and noise."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call

from conftest import make_config
from helpers.oracle import (
    WAYS,
    assert_equal,
    joint,
    make_engine,
    randomise,
    trained,
    without_engine,
)
from lalora_app.adapter import parametrisations
from lalora_app.adapter.factors import Adapter, active_names, factor_pairs, kind, sibling
from lalora_app.adapter.parametrisations import fixed_b_name
from lalora_app.client import local_round
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.frozen_weights import base_layers
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step import step
from lalora_app.private_step.engine import KernelEngine
from lalora_app.private_step.mechanism import clipped_sum
from lalora_app.private_step.reparametrised_engine import ReparametrisedEngine

AB = frozenset("AB")
OWN = [name for name, method in METHODS.items() if method.effective is not None]
SEEDS = st.integers(0, 2**32 - 1)
B, A = "q.lora_B.weight", "q.lora_A.weight"
GATE, HEAD = "q.lora_gate.weight", "classifier.weight"
M, N = 6, 9

Theta = dict[str, Tensor]
Effective = Callable[[Theta], Theta]


@cache
def rule(tasks: int = 3, temperature: float = 0.5):
    return make_config(**{"rule.tasks": tasks, "rule.gate-temperature": temperature}).rule


def test_these_methods_have_parameters_of_their_own():
    assert {"beamlora", "sd-lora", "duallora"} <= set(OWN)


# Products, compared with dense sums over directions.


def drawn_start(seed: int, rank: int, *, zero_b: bool = False) -> Adapter:
    rng = np.random.default_rng(seed)
    shapes = {B: (M, rank), A: (rank, N), HEAD: (2, 5)}
    start = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    return start | ({B: np.zeros_like(start[B])} if zero_b else {})


def tensors(adapter: Adapter, dtype: torch.dtype = torch.float64) -> Theta:
    return {name: torch.from_numpy(array).to(dtype) for name, array in adapter.items()}


def product(own: Theta) -> np.ndarray:
    return (own[B].double() @ own[A].double()).numpy()


def outer_sum(weights, left: Tensor, right: Tensor) -> np.ndarray:
    """Σ_j w_j · (column j of left) · (row j of right)."""
    total = np.zeros((M, N))
    for j, weight in enumerate(weights):
        total += weight * np.outer(left[:, j].double().numpy(), right[j].double().numpy())
    return total


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_gates_weigh_every_direction_by_their_softmax(rank, temperature):
    numbers, rng = rule(temperature=temperature), np.random.default_rng(rank)
    theta = tensors(parametrisations.add_gates(drawn_start(rank, rank), numbers))
    theta[GATE] = torch.from_numpy(rng.standard_normal(rank))
    powers = [math.exp((float(g) - 3) / temperature) for g in theta[GATE]]
    weights = [rank * power / sum(powers) for power in powers]
    own = parametrisations.gated_factors(theta, numbers)
    np.testing.assert_allclose(product(own), outer_sum(weights, theta[B], theta[A]), rtol=1e-9)
    assert own.keys() == {A, B, HEAD}
    assert own[HEAD] is theta[HEAD]
    assert sum(weights) == pytest.approx(rank)


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_gates_at_zero_leave_the_factors_to_the_bit(rank):
    start = drawn_start(0, rank)
    theta = tensors(parametrisations.add_gates(start, rule()), torch.float32)
    own = parametrisations.gated_factors(theta, rule())
    for name, array in start.items():
        assert np.array_equal(own[name].numpy(), array)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_a_gate_of_rank_one_has_no_say_and_no_gradient(temperature):
    numbers = rule(temperature=temperature)
    theta = tensors(parametrisations.add_gates(drawn_start(1, 1), numbers))
    theta[GATE] = torch.full((1,), -7.0, dtype=torch.float64, requires_grad=True)
    own = parametrisations.gated_factors(theta, numbers)
    assert torch.equal(own[A], theta[A])
    own[A].square().sum().backward()
    assert float(theta[GATE].grad) == 0


@pytest.mark.parametrize(("rank", "tasks"), [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_directions_of_the_tasks_before_count_with_their_magnitudes(rank, tasks):
    numbers, rng = rule(tasks), np.random.default_rng(rank)
    theta = tensors(parametrisations.add_task_directions(drawn_start(2, rank * tasks), numbers))
    for name, value in theta.items():
        theta[name] = torch.from_numpy(rng.standard_normal(value.shape))
    expected = outer_sum([1.0] * rank, theta[B], theta[A])
    left, right = theta[fixed_b_name(B)], theta[sibling(A, "fixed")]
    for task in range(tasks - 1):
        place = slice(task * rank, (task + 1) * rank)
        magnitude = float(theta[GATE][task])
        expected += outer_sum([magnitude] * rank, left[:, place], right[place])
    own = parametrisations.factors_with_task_directions(theta, numbers)
    np.testing.assert_allclose(product(own), expected, rtol=1e-9, atol=1e-12)
    assert (own[A].shape, own[B].shape) == ((rank * tasks, N), (M, rank * tasks))
    assert own.keys() == {A, B, HEAD}


def orthonormal(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, rows)))[0].T


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("used", [0, 1, 4])
def test_half_of_the_rows_see_nothing_of_the_basis_and_the_others_nothing_else(rank, used):
    numbers, rng = rule(4), np.random.default_rng(rank)
    theta = tensors(parametrisations.add_task_basis(drawn_start(3, rank), numbers))
    name, half = sibling(A, "fixed"), rank // 2
    room = theta[name].shape[0]
    basis = np.zeros((room, N))
    basis[: min(used, room)] = orthonormal(rng, min(used, room), N)
    theta[name] = torch.from_numpy(basis)
    own = parametrisations.projected_factors(theta, numbers)
    inputs = rng.standard_normal((7, N))
    for x in inputs:
        inside = sum((phi @ x) * phi for phi in basis)
        seen = inside if used else x
        left, right = theta[B].numpy(), theta[A].numpy()
        expected = left[:, :half] @ (right[:half] @ (x - inside))
        expected = expected + left[:, half:] @ (right[half:] @ seen)
        np.testing.assert_allclose(product(own) @ x, expected, rtol=1e-9, atol=1e-12)
    assert own.keys() == {A, B, HEAD}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("rank", "tasks"), [(2, 3), (1, 2), (3, 1)])
def test_a_run_starts_from_pefts_own_factors_and_a_zero_product(name, rank, tasks):
    method, numbers = METHODS[name], rule(tasks)
    width = method.width(rank, numbers)
    plain = drawn_start(4, width, zero_b=True)
    before = {n: array.copy() for n, array in plain.items()}
    start = method.start(plain, numbers)
    assert all(array.dtype == np.float32 for array in start.values())
    assert np.array_equal(start[A], plain[A][:rank])
    assert not start[B].any()
    assert start[HEAD] is plain[HEAD]
    own = method.effective(tensors(start, torch.float32), numbers)
    assert {n: tuple(x.shape) for n, x in own.items()} == {n: x.shape for n, x in plain.items()}
    assert not product(own).any()
    assert not any(start[n].any() for n in start if kind(n) == "gate")
    assert all(np.array_equal(plain[n], array) for n, array in before.items())
    # For any B, the initial product is B·A: gates, magnitudes and bases have no effect yet.
    start[B] = np.random.default_rng(0).standard_normal(start[B].shape).astype(np.float32)
    own = method.effective(tensors(start, torch.float32), numbers)
    np.testing.assert_allclose(product(own), start[B] @ start[A], rtol=1e-5, atol=1e-6)


def test_sd_lora_alone_needs_a_wider_model():
    for name, method in METHODS.items():
        for tasks in (1, 3):
            wanted = 4 * tasks if name == "sd-lora" else 4
            assert method.width(4, rule(tasks)) == wanted, name


# Per-example gradients, against autograd on one example at a time, in float64.


class Net(nn.Module):
    """A model of two adapted layers and a head, for inputs (examples, tokens, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(hidden)).mean(1))


RANK, TASKS, EXAMPLES = 2, 3, 4


def net(width: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    return randomise(get_peft_model(Net(), LoraConfig(r=width, lora_alpha=2 * width, **targets)))


def losses_of(model: Callable[[Tensor], Tensor], indices: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES + 3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.arange(EXAMPLES + 3) % 3
    return nn.functional.cross_entropy(model(x[indices]), labels[indices], reduction="none")


def tangled(theta: Theta) -> Theta:
    """A nonlinear parametrisation, in which both factors depend on every tensor of a layer."""
    own = {}
    for name, value in theta.items():
        if kind(name) == "head":
            own[name] = value + value**3
    for b, a in factor_pairs(theta):
        mix, gate = torch.tanh(theta[a] @ theta[a].T), theta[sibling(a, "gate")]
        own[b] = theta[b] @ mix + theta[sibling(a, "fixed")].sum() * torch.sin(theta[b])
        own[a] = torch.sin(theta[a]) * gate.exp()[:, None] + theta[b].sum() * theta[a] ** 2
    return own


def tangled_start(plain: Adapter) -> Adapter:
    extra = {sibling(a, "gate"): plain[a][:, 0] for _, a in factor_pairs(plain)}
    return plain | extra | {sibling(a, "fixed"): plain[a][:, :2] for _, a in factor_pairs(plain)}


def random_theta(theta: Theta, seed: int = 0) -> Theta:
    """Return random values for all tensors; a wide fixed tensor has orthonormal rows."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, value in theta.items():
        drawn = rng.normal(0, 0.5, value.shape)
        if kind(name) == "fixed" and value.ndim == 2 and value.shape[0] < value.shape[1]:
            drawn = orthonormal(rng, *value.shape)
        values[name] = torch.from_numpy(drawn).to(value)
    return values


def pulled(name: str) -> tuple[nn.Module, Theta, Effective]:
    """Return model, theta and parametrisation of a method or of :func:`tangled`."""
    numbers = rule(TASKS)
    width = METHODS[name].width(RANK, numbers) if name in METHODS else RANK
    model = net(width)
    plain = {n: p.detach().float().numpy() for n, p in trained(model).items()}
    if name not in METHODS:
        return model, random_theta(tensors(tangled_start(plain))), tangled
    method = METHODS[name]
    theta = random_theta(tensors(method.start(plain, numbers)))
    return model, theta, lambda values: method.effective(values, numbers)


def loop(model: nn.Module, theta: Theta, effective: Effective, active, indices) -> Theta:
    rows: dict[str, list[Tensor]] = {name: [] for name in active}
    for i in indices:
        leaves = {name: theta[name].clone().requires_grad_() for name in sorted(active)}
        own = effective({name: leaves.get(name, value) for name, value in theta.items()})
        (loss,) = losses_of(lambda x, own=own: functional_call(model, own, (x,)), [i])
        for name, grad in zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True):
            rows[name].append(grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


ACTIVE = [AB, frozenset("B"), frozenset("A"), frozenset()]


@pytest.mark.parametrize("name", [*OWN, "tangled"])
def test_every_example_has_the_gradient_of_its_own_loss_through_the_parametrisation(name):
    model, theta, effective = pulled(name)
    plain = without_engine(model)
    for way, flat in WAYS:
        adapted = without_engine(model)
        engine = ReparametrisedEngine(make_engine(adapted, way, flat=flat), theta, effective)
        for k, factors in enumerate(ACTIVE):
            active = active_names(theta, factors)
            engine.activate(active)
            indices = [(k + i) % EXAMPLES for i in range(EXAMPLES - k)]
            grads = engine.gradients(
                lambda m=adapted, i=indices: losses_of(m, i), len(indices)
            ).dense()
            assert set(grads) == active
            assert not any(kind(tensor) == "fixed" for tensor in grads)
            assert_equal(grads, loop(plain, theta, effective, active, indices), 1e-10)
        assert all(p.grad is None for p in engine.parameters.values())
        assert all(p.grad is None for p in adapted.parameters())
        assert all(torch.equal(p, theta[n]) for n, p in engine.parameters.items())


def test_active_tensors_alone_make_the_norm():
    model, theta, effective = pulled("beamlora")
    engine = ReparametrisedEngine(KernelEngine(model, trained(model)), theta, effective)
    active = active_names(theta, frozenset("B"))
    engine.activate(active)
    grads = engine.gradients(lambda: losses_of(model, [0, 1]), 2)
    rows = loop(without_engine(model), theta, effective, active, [0, 1])
    wanted = [joint([grad[i] for grad in rows.values()]) for i in range(2)]
    np.testing.assert_allclose(grads.norms(), wanted, rtol=1e-10)


@pytest.fixture(scope="module")
def engines():
    made = {}
    for name in [*OWN, "tangled"]:
        model, theta, effective = pulled(name)
        pulled_back = ReparametrisedEngine(KernelEngine(model, trained(model)), theta, effective)
        made[name] = model, pulled_back, active_names(theta, AB)
    return made


@given(
    name=st.sampled_from([*OWN, "tangled"]),
    seed=SEEDS,
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    clip_norm=st.sampled_from([1e-3, 0.1, 3.0]),
    left_out=st.integers(0, EXAMPLES - 1),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_example_more_or_less_moves_the_clipped_sum_by_at_most_the_clip_norm(
    engines, name, seed, size, clip_norm, left_out
):
    model, engine, active = engines[name]
    values = random_theta({n: p.detach() for n, p in engine.parameters.items()}, seed)
    with torch.no_grad():
        for tensor, parameter in engine.parameters.items():
            parameter.copy_(values[tensor] * (1.0 if kind(tensor) == "fixed" else size))
    engine.activate(active)
    everyone = list(range(EXAMPLES))

    def released(indices: list[int]) -> Theta:
        grads = engine.gradients(lambda: losses_of(model, indices), len(indices))
        return clipped_sum(grads, clip_norm)

    whole = released(everyone)
    rest = released([i for i in everyone if i != left_out])
    moved = joint([whole[tensor] - rest[tensor] for tensor in whole])
    assert moved <= clip_norm * (1 + 1e-9)
    assert joint(list(released([left_out]).values())) <= clip_norm


# With the backbone of a run.


@pytest.fixture
def built(tiny):
    def make(name: str, **changes) -> tuple[Backbone, Adapter]:
        return build(
            tiny(**{"method": name, "num-server-rounds": 3, "model.pooling": "mean"} | changes)
        )

    return make


@pytest.fixture
def data(tiny, built) -> EncodedTexts:
    model, _ = built("dp-lora")
    encoded = model.encode(split(tiny().data)[0])
    return EncodedTexts(encoded.tokens[:12], encoded.labels[:12], encoded.pad)


def filled(start: Adapter) -> Adapter:
    return {n: x.numpy() for n, x in random_theta(tensors(start, torch.float32)).items()}


def release(backbone, data, *, z=0.0, clip_norm=0.7, seed=0) -> Theta:
    return step.private_gradient(
        backbone,
        data,
        reservation=Reservation(Release(1.0, z, 1)),
        clip_norm=clip_norm,
        micro_batch=5,
        streams=step.RandomStreams(seeded(seed, "sampling"), seeded(seed, "noise")),
    )


@pytest.mark.parametrize("name", OWN)
def test_the_model_is_as_wide_as_the_method_needs_and_its_scale_is_the_runs(name, built):
    backbone, start = built(name, **{"lora.rank": 2, "lora.alpha": 3.0, "rule.tasks": 3})
    width = METHODS[name].width(2, rule(3))
    layers = base_layers(backbone.model)
    assert layers
    for b, layer in layers.items():
        assert layer.lora_A["default"].weight.shape[0] == width
        assert layer.scaling["default"] == 1.5
        assert start[b].shape[1] == start[sibling(b, "A")].shape[0] == 2


@pytest.mark.parametrize("name", OWN)
def test_an_evaluation_is_that_of_a_dense_model_with_the_parametrised_product(name, built, data):
    backbone, start = built(name, **{"rule.tasks": 3})
    theta = filled(start)
    backbone.load(theta)
    batch = data.batch(list(range(len(data))))
    with torch.no_grad():
        found = backbone.logits(batch)
    own = METHODS[name].effective(tensors(theta), rule(3))
    model = without_engine(backbone.model)
    with torch.no_grad():
        for b, layer in base_layers(model).items():
            layer.base_layer.weight.add_(layer.scaling["default"] * (own[b] @ own[sibling(b, "A")]))
            layer.lora_B["default"].weight.zero_()
        expected = replace(backbone, model=model).logits(batch)
        backbone.load(start)
        started = backbone.logits(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - started).abs().max() > 1e-2
    assert all(np.array_equal(backbone.adapter()[n], x) for n, x in start.items())


def chi2(samples: list[Tensor], std: float) -> float:
    """Return the two-sided p-value of a variance (chi-squared test)."""
    total = sum(float(s.double().square().sum()) for s in samples) / std**2
    tail = stats.chi2.cdf(total, sum(s.numel() for s in samples))
    return 2 * min(tail, 1 - tail)


@pytest.mark.parametrize("name", OWN)
def test_noise_of_every_entry_is_the_multiplier_times_the_clip_norm(name, built, data):
    backbone, start = built(name, **{"rule.tasks": 3})
    backbone.load(filled(start))
    active = active_names(start, AB)
    backbone.engine.activate(active)
    z, clip_norm = 2.0, 0.7
    clean = release(backbone, data, clip_norm=clip_norm)
    assert all(grad.any() for grad in clean.values())
    by_kind: dict[str, list[Tensor]] = {}
    for seed in range(25):
        noised = release(backbone, data, z=z, clip_norm=clip_norm, seed=seed)
        assert noised.keys() == clean.keys() == active
        for tensor, value in noised.items():
            by_kind.setdefault(kind(tensor), []).append(value - clean[tensor])
    expected = {"A", "B", "head"} | {kind(n) for n in start if kind(n) == "gate"}
    assert set(by_kind) == expected
    std = z * clip_norm / len(data)
    for which, samples in by_kind.items():
        assert chi2(samples, std) > 0.001, which
        for wrong in (2 / 3, 3 / 2):
            assert chi2(samples, wrong * std) < 1e-6, which
    backbone.load(start)


def local_of(name: str, **changes) -> local_round.LocalSettings:
    config = make_config(
        **{
            "rule.tasks": 3,
            "train.optimizer": "adamw",
            "train.weight-decay": 0.1,
            "train.local-steps": 2,
        }
        | changes
    )
    return local_round.LocalSettings(METHODS[name], 1, 3, config.train, config.rule, 0.7)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("factors", ACTIVE[1:])
def test_what_rests_or_is_fixed_keeps_its_bits_under_adamw(name, factors, built, data):
    backbone, start = built(name, **{"rule.tasks": 3})
    theta = filled(start)
    backbone.load(theta)
    optimizer = local_round.make_optimizer(backbone, local_of(name), 0.1, {})
    for names in (AB, factors, factors):  # AdamW has moments and weight decay
        backbone.engine.activate(active_names(start, names))
        before = backbone.adapter()
        local_round.apply(backbone, optimizer, release(backbone, data, z=1.0))
        after = backbone.adapter()
        active = active_names(start, names)
        for tensor, array in before.items():
            assert np.array_equal(after[tensor], array) == (tensor not in active), tensor
    fixed = [n for n in start if kind(n) == "fixed"]
    assert all(np.array_equal(after[n], theta[n]) for n in fixed)
    assert all(backbone.engine.parameters[n].grad is None for n in fixed)
    backbone.load(start)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_private_round_trains_all_but_what_is_fixed(name, tasks, built, data):
    backbone, start = built(name, **{"rule.tasks": tasks})
    result = local_round.run_round(
        backbone,
        data,
        start,
        {},
        local=local_of(name, **{"rule.tasks": tasks}),
        reservation=Reservation(Release(0.5, 1.0, 2)),
        streams=step.RandomStreams(seeded(0, "sampling"), seeded(0, "noise")),
    )
    assert {n: x.shape for n, x in result.items()} == {n: x.shape for n, x in start.items()}
    for tensor, array in start.items():
        rests = kind(tensor) == "fixed" or not array.size
        assert np.array_equal(result[tensor], array) == rests, tensor
        assert np.isfinite(result[tensor]).all()
    backbone.load(start)
