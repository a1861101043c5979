"""The local optimisers, compared with float64 loops, and their limit cases."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from conftest import make_config
from lalora_app.adapter.parametrisations import change_name, moment_name
from lalora_app.client.local_round import LocalSettings, make_optimizer
from lalora_app.methods.learning_rates import rate_factor
from lalora_app.methods.noised_optimizers import LowPassSGD, UnbiasedAdamW
from lalora_app.methods.optimizers import (
    OptimizerSettings,
    configured_optimizer,
    guided_adamw,
    lora_plus,
    low_pass_sgd,
    no_report,
    second_moments,
    unbiased_adamw,
)
from lalora_app.methods.table import METHODS

SHAPE = (3, 4)
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=20, deadline=None, derandomize=True)


def hyper(noise_std: float = 0.0, **changes) -> OptimizerSettings:
    config = make_config(**changes)
    zero = np.zeros(SHAPE)  # of the two tensors that a test may name
    memory = received(0.0, zero, "A0") | received(0.0, zero, "B0")
    return OptimizerSettings(config.train, config.rule, noise_std, memory)


def parameter(values: np.ndarray) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(values.copy()))


def group(*parameters: Tensor, lr: float, kind: str = "A") -> dict:
    names = [f"{kind}{i}" for i in range(len(parameters))]
    return {"kind": kind, "params": list(parameters), "names": names, "lr": lr}


def after(optimizer, x: Tensor, grads: np.ndarray) -> list[np.ndarray]:
    """Return the values after every step."""
    values = []
    for grad in grads:
        x.grad = torch.from_numpy(grad)
        optimizer.step()
        values.append(x.detach().numpy().copy())
    return values


def drawn(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), rng.standard_normal((steps, *SHAPE))


# DOPPLER.


def polynomial_loop(start, grads, lr, a, decay, order):
    """The paper's form: m_t = −Σ a_τ·m_{t−τ} + Σ b_τ·g_{t−τ}; c_t is the same of gradients 1."""
    poles, zeros = np.poly([a] * order), np.poly([-1.0] * order) * ((1 - a) / 2) ** order
    x, values, ms, cs = start, [], [], []
    for t in range(len(grads)):
        m, c = np.zeros(SHAPE), 0.0
        for tau in range(min(order, t) + 1):
            m, c = m + zeros[tau] * grads[t - tau], c + zeros[tau]
        for tau in range(1, min(order, t) + 1):
            m, c = m - poles[tau] * ms[t - tau], c - poles[tau] * cs[t - tau]
        ms.append(m)
        cs.append(c)
        x = x - lr * decay * x - lr * m / c
        values.append(x)
    return values


@given(
    seed=SEEDS,
    steps=st.integers(1, 9),
    order=st.integers(1, 4),
    decay=st.sampled_from([0.0, 0.05]),
)
@FEW
def test_a_filter_of_any_order_is_the_recursion_of_the_paper(seed, steps, order, decay):
    start, grads = drawn(seed, steps)
    x = parameter(start)
    run = hyper(**{"train.weight-decay": decay, "rule.filter-order": order})
    found = after(low_pass_sgd([group(x, lr=0.7)], run), x, grads)
    expected = polynomial_loop(start, grads, 0.7, LowPassSGD.COEFFICIENT, decay, order)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_on_a_constant_gradient_a_filter_of_any_order_is_sgd(order):
    start, grads = drawn(2, 1)
    x, y, constant = parameter(start), parameter(start), np.repeat(grads, 30, axis=0)
    found = after(LowPassSGD([group(x, lr=0.1)], 0.0, order), x, constant)
    expected = after(torch.optim.SGD([y], lr=0.1), y, constant)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def doppler_loop(start, grads, lr, a, decay):
    """Return the parameter after every step: m/c replaces the gradient, c is m for gradients 1."""
    m, c, last, last_one, x, values = 0.0, 0.0, 0.0, 0.0, start, []
    for grad in grads:
        m = a * m + (1 - a) / 2 * (grad + last)
        c = a * c + (1 - a) / 2 * (1 + last_one)
        last, last_one = grad, 1
        x = x - lr * decay * x - lr * m / c
        values.append(x)
    return values


@given(
    seed=SEEDS, steps=st.integers(1, 8), lr=st.floats(1e-3, 3), decay=st.sampled_from([0.0, 0.05])
)
@FEW
def test_the_low_pass_filter_equals_a_float64_loop(seed, steps, lr, decay):
    start, grads = drawn(seed, steps)
    x = parameter(start)
    optimizer = low_pass_sgd([group(x, lr=lr)], hyper(**{"train.weight-decay": decay}))
    found = after(optimizer, x, grads)
    expected = doppler_loop(start, grads, lr, LowPassSGD.COEFFICIENT, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_a_past_gradient_is_weighted_by_the_impulse_response():
    a, steps = LowPassSGD.COEFFICIENT, 12
    response = (1 - a) / 2 * np.array([1, *((1 + a) * a**k for k in range(steps - 1))])
    start, grads = drawn(0, steps)
    x = parameter(start)
    values = [start, *after(LowPassSGD([group(x, lr=1.0)]), x, grads)]
    for t in range(steps):
        shares = response[: t + 1][::-1] / response[: t + 1].sum()
        expected = np.tensordot(shares, grads[: t + 1], axes=1)
        np.testing.assert_allclose(values[t] - values[t + 1], expected, rtol=1e-10, atol=1e-12)


def test_at_coefficient_zero_two_successive_gradients_are_averaged(monkeypatch):
    monkeypatch.setattr(LowPassSGD, "COEFFICIENT", 0.0)
    start, grads = drawn(1, 5)
    x = parameter(start)
    moved = -np.diff([start, *after(LowPassSGD([group(x, lr=1.0)]), x, grads)], axis=0)
    np.testing.assert_allclose(
        moved[0], grads[0], rtol=1e-12
    )  # the first gradient has no predecessor
    np.testing.assert_allclose(moved[1:], (grads[1:] + grads[:-1]) / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("a", [0.9, 0.5, 0.0])
def test_the_variance_of_white_noise_is_multiplied_by_half_of_one_minus_a(a, monkeypatch):
    monkeypatch.setattr(LowPassSGD, "COEFFICIENT", a)
    x = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer, rng = LowPassSGD([group(x, lr=1.0)]), np.random.default_rng(0)
    values = after(optimizer, x, rng.standard_normal((80, 20_000)))
    moved = values[-1] - values[-2]
    assert moved.var() == pytest.approx((1 - a) / 2, rel=0.05)  # an estimate's error is about 1 %


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_on_a_constant_gradient_the_low_pass_filter_is_sgd_from_the_first_step_on(dtype):
    start, grads = (array.astype(dtype) for array in drawn(2, 1))
    x, y = parameter(start), parameter(start)
    constant = np.repeat(grads, 30, axis=0)
    found = after(LowPassSGD([group(x, lr=0.1)]), x, constant)
    expected = after(torch.optim.SGD([y], lr=0.1), y, constant)
    scale = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(found, expected, rtol=scale, atol=scale)


# DP-FedAdamW.


def unbiased_loop(start, grads, lr, noise_std, decay):
    m = v = np.zeros(SHAPE)
    x, values = start, []
    for k, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        signal = np.maximum(v / (1 - 0.999**k) - noise_std**2, 0)
        x = x - lr * decay * x - lr * m / (1 - 0.9**k) / (np.sqrt(signal) + max(noise_std, 1e-8))
        values.append(x)
    return values


@given(
    seed=SEEDS,
    steps=st.integers(1, 8),
    noise_std=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 3.0]),
    decay=st.sampled_from([0.0, 0.05]),
)
@FEW
def test_the_noise_variance_is_subtracted_from_the_second_moment(seed, steps, noise_std, decay):
    start, grads = drawn(seed, steps)
    x = parameter(start)
    run = hyper(noise_std, **{"train.weight-decay": decay})
    found = after(unbiased_adamw([group(x, lr=0.05)], run), x, grads)
    expected = unbiased_loop(start, grads, 0.05, noise_std, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_noise_unbiased_adamw_is_adamw(decay):
    start, grads = drawn(3, 10)
    x, y = parameter(start), parameter(start)
    found = after(UnbiasedAdamW([group(x, lr=0.02)], 0.0, decay), x, grads)
    adamw = torch.optim.AdamW([y], lr=0.02, eps=1e-8, weight_decay=decay)
    np.testing.assert_allclose(found, after(adamw, y, grads), rtol=1e-10, atol=1e-12)


def test_below_the_noise_the_step_is_the_mean_gradient_over_the_noises_deviation():
    start, grads = drawn(4, 1)
    x = parameter(start)
    (found,) = after(UnbiasedAdamW([group(x, lr=0.02)], 100.0), x, grads)
    np.testing.assert_allclose(found, start - 0.02 * grads[0] / 100, rtol=1e-12)


@given(
    size=st.integers(-30, 15).map(lambda exponent: 10.0**exponent),
    noise_std=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=SEEDS,
)
@FEW
def test_unbiased_adamw_never_divides_by_zero(size, noise_std, dtype, seed):
    start, grads = (array.astype(dtype) for array in drawn(seed, 3))
    grads = grads * dtype(size)
    grads[:, 0] = 0
    x = parameter(start)
    found = after(UnbiasedAdamW([group(x, lr=0.01)], noise_std), x, grads)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[-1][0], start[0])  # no gradient, no step


# DP-FedAdamW with the server's parts.


def guided_loop(start, grads, lr, run, mean, change):
    """v from v̄ + s², without a correction unless v̄ is unknown; and the pull."""
    noise_std, decay = run.noise_std, run.train.weight_decay
    m, v, x, values = np.zeros(SHAPE), np.zeros(SHAPE), start, []
    if mean > 0:
        v = v + mean + noise_std**2
    for k, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        square = v if mean > 0 else v / (1 - 0.999**k)
        size = np.sqrt(np.maximum(square - noise_std**2, 0)) + max(noise_std, 1e-8)
        x = x - lr * decay * x - lr * m / (1 - 0.9**k) / size
        x = x + run.rule.global_pull * lr / run.train.local_steps * change
        values.append(x)
    return values, max(square.mean() - noise_std**2, 0)


def received(mean: float, change: np.ndarray, name: str) -> dict:
    return {moment_name(name): np.float32([mean]), change_name(name): change}


@given(
    seed=SEEDS,
    steps=st.integers(1, 6),
    noise_std=st.sampled_from([0.0, 0.5]),
    mean=st.sampled_from([0.0, 0.25, 2.0]),
    decay=st.sampled_from([0.0, 0.05]),
    pull=st.sampled_from([0.0, 0.5]),
)
@FEW
def test_v_starts_from_the_servers_mean_and_steps_follow_the_last_change(
    seed, steps, noise_std, mean, decay, pull
):
    start, grads = drawn(seed, steps)
    change, x = drawn(seed + 1, 1)[0], parameter(start)
    changes = {"train.weight-decay": decay, "rule.global-pull": pull, "train.local-steps": 3}
    run = replace(hyper(noise_std, **changes), received=received(mean, change, "A0"))
    optimizer = guided_adamw([group(x, lr=0.05)], run)
    found = after(optimizer, x, grads)
    expected, square = guided_loop(start, grads, 0.05, run, mean, change)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    (sent,) = second_moments(optimizer).items()
    assert sent[0] == moment_name("A0")
    assert (sent[1].shape, sent[1].dtype) == ((1,), np.float32)
    assert sent[1][0] == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize("mean", [0.0, -1.0])
def test_before_the_first_round_guided_is_unbiased_adamw_to_the_bit(mean):
    start, grads = (array.astype(np.float32) for array in drawn(5, 6))
    x, y = parameter(start), parameter(start)
    memory = received(mean, np.zeros(SHAPE, np.float32), "A0")
    run = hyper(0.3, **{"train.weight-decay": 0.1})
    found = after(guided_adamw([group(x, lr=0.02)], replace(run, received=memory)), x, grads)
    expected = after(unbiased_adamw([group(y, lr=0.02)], run), y, grads)
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_no_other_optimiser_has_anything_to_report():
    x = parameter(drawn(0, 1)[0])
    for make in (configured_optimizer, low_pass_sgd, unbiased_adamw):
        assert second_moments(make([group(x, lr=0.1)], hyper(0.1))) == {}
    assert no_report(guided_adamw([group(x, lr=0.1)], hyper(0.1))) == {}


# LoRA+.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_lora_plus_multiplies_only_the_learning_rate_of_b(optimizer):
    rates = {"B": 7.0, "A": 0.3, "head": 5.0, "gate": 0.01}
    groups = [group(parameter(drawn(0, 1)[0]), lr=lr, kind=kind) for kind, lr in rates.items()]
    before = copy.deepcopy(groups)
    made = lora_plus(groups, hyper(**{"train.optimizer": optimizer, "rule.lr-ratio": 5.0}))
    found = {g["kind"]: g["lr"] for g in made.param_groups}
    assert found == {"B": pytest.approx(1.5), "A": 0.3, "head": 5.0, "gate": 0.01}
    assert type(made) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    assert [(g["kind"], g["lr"]) for g in groups] == [(g["kind"], g["lr"]) for g in before]


def test_lora_plus_with_the_ratio_of_the_run_is_the_plain_optimiser():
    changes = {"train.lr-a": 0.5, "train.lr-b": 1.5, "rule.lr-ratio": 3.0}
    rates = {"A": 0.5, "B": 1.5}
    groups = [group(parameter(drawn(0, 1)[0]), lr=lr, kind=kind) for kind, lr in rates.items()]
    made, plain = (
        lora_plus(groups, hyper(**changes)),
        configured_optimizer(groups, hyper(**changes)),
    )
    assert [g["lr"] for g in made.param_groups] == [g["lr"] for g in plain.param_groups]


# All optimisers.

MAKES = {
    "sgd": (configured_optimizer, {"train.optimizer": "sgd", "train.momentum": 0.9}),
    "adamw": (configured_optimizer, {"train.optimizer": "adamw"}),
    "lora-plus": (lora_plus, {"train.optimizer": "adamw"}),
    "doppler": (low_pass_sgd, {}),
    "dp-fedadamw": (unbiased_adamw, {}),
    "dp-fedadamw-full": (guided_adamw, {}),
}


def test_every_optimiser_of_the_table_is_tested_here():
    makes = {make for make, _ in MAKES.values()}
    assert {method.optimizer for method in METHODS.values()} <= makes


@pytest.mark.parametrize("name", MAKES)
def test_a_tensor_without_gradient_keeps_value_and_state_to_the_bit(name):
    make, changes = MAKES[name]
    active, resting = (parameter(drawn(seed, 1)[0]) for seed in (0, 1))
    groups = [group(active, lr=0.1), group(resting, lr=0.2, kind="B")]
    optimizer = make(groups, hyper(0.3, **changes | {"train.weight-decay": 0.1}))
    for seed in range(3):
        active.grad, resting.grad = (torch.from_numpy(g) for g in drawn(seed, 2)[1])
        optimizer.step()
    value, state = resting.detach().clone(), copy.deepcopy(optimizer.state[resting])
    assert state
    for seed in range(3):
        active.grad, resting.grad = torch.from_numpy(drawn(seed, 1)[1][0]), None
        before = active.detach().clone()
        optimizer.step()
        assert not torch.equal(active, before)
    assert torch.equal(resting, value)
    now = optimizer.state[resting]
    assert now.keys() == state.keys()
    for key, kept in state.items():
        assert torch.equal(torch.as_tensor(now[key]), torch.as_tensor(kept)), key


# The schedule of the learning rates.


def factors(steps: int, **changes) -> list[float]:
    train = make_config(**changes).train
    return [rate_factor(train, before, steps) for before in range(steps)]


def test_without_a_schedule_every_step_has_the_whole_rate():
    assert factors(40) == [1.0] * 40


def test_the_warm_up_grows_in_equal_parts_from_one_part_on():
    assert factors(10, **{"train.warm-up": 0.4}) == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert factors(10, **{"train.warm-up": 0.25}) == [0.4, 0.8, *[1.0] * 8]


def test_the_cosine_begins_after_the_warm_up_and_would_end_at_zero_after_the_last_step():
    found = factors(8, **{"train.schedule": "cosine"})
    assert found[0] == 1
    assert found[4] == pytest.approx(0.5)
    assert found == pytest.approx([np.cos(np.pi * s / 16) ** 2 for s in range(8)])
    warm = factors(10, **{"train.schedule": "cosine", "train.warm-up": 0.2})
    assert warm == pytest.approx([0.5, 1.0, *found])
    train = make_config(**{"train.schedule": "cosine"}).train
    assert rate_factor(train, 8, 8) == 0


@given(
    steps=st.integers(1, 300),
    warm_up=st.floats(0, 1, exclude_max=True),
    schedule=st.sampled_from(["constant", "cosine"]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_step_of_any_schedule_is_lost_or_enlarged(steps, warm_up, schedule):
    found = factors(steps, **{"train.schedule": schedule, "train.warm-up": warm_up})
    assert all(0 < factor <= 1 for factor in found)
    if warm_up * steps <= 1:
        assert found[0] == 1
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_rounds_and_steps_count_in_one_row():
    config = make_config(**{"train.schedule": "cosine", "train.local-steps": 4})
    found = []
    for t in (1, 2, 3):
        local = LocalSettings(METHODS["la-lora"], t, 3, config.train, config.rule, 1.0)
        found += [local.rate_factor(k) for k in range(4)]
    assert found == factors(12, **{"train.schedule": "cosine"})


@pytest.mark.parametrize("name", MAKES)
def test_every_optimiser_follows_the_rates_of_its_groups(name):
    """A step is the rate times a direction; a run at a constant rate shows the directions."""
    make, changes = MAKES[name]
    start, grads = drawn(6, 5)
    plain, scheduled = parameter(start), parameter(start)
    steady = after(make([group(plain, lr=0.1)], hyper(0.3, **changes)), plain, grads)
    optimizer = make([group(scheduled, lr=0.1)], hyper(0.3, **changes))
    schedule = LambdaLR(optimizer, lambda k: 1 / (k + 1))
    expected = start
    for k, moved in enumerate(np.diff([start, *steady], axis=0)):
        scheduled.grad = torch.from_numpy(grads[k])
        optimizer.step()
        schedule.step()
        expected = expected + moved / (k + 1)
        np.testing.assert_allclose(scheduled.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["adamw", "doppler", "dp-fedadamw"])
def test_weight_decay_is_decoupled_from_the_gradient(name):
    make, changes = MAKES[name]
    start, grads = drawn(5, 4)
    plain, decayed = parameter(start), parameter(start)
    optimizers = [
        make([group(x, lr=0.1)], hyper(0.3, **changes | {"train.weight-decay": decay}))
        for x, decay in ((plain, 0.0), (decayed, 0.5))
    ]
    last = start
    without, found = (after(o, x, grads) for o, x in zip(optimizers, (plain, decayed), strict=True))
    for step, (old, new) in enumerate(zip([start, *without], without, strict=False)):
        expected = last * (1 - 0.1 * 0.5) + (new - old)
        np.testing.assert_allclose(found[step], expected, rtol=1e-10, atol=1e-12)
        last = found[step]


@pytest.mark.parametrize("name", ["doppler", "dp-fedadamw"])
def test_learning_rates_depend_on_kind_and_round_and_fixed_tensors_have_none(name):
    config = make_config(**{"train.lr-decay": 0.5, "rule.lr-gate": 0.25})
    kinds = ("lora_A", "lora_B", "lora_gate", "lora_fixed", "lora_fixed.B")
    named = {f"q.{part}.weight": parameter(drawn(0, 1)[0]) for part in kinds}
    named["classifier.weight"] = parameter(drawn(0, 1)[0])
    local = LocalSettings(METHODS[name], 3, 9, config.train, config.rule, 1.0)
    backbone = SimpleNamespace(engine=SimpleNamespace(parameters=named))
    made = make_optimizer(backbone, local, 0.7, {})
    train = config.train
    wanted = {"A": train.lr_a, "B": train.lr_b, "W": train.lr_w}
    wanted |= {"head": train.lr_head, "gate": 0.25}
    assert {g["kind"]: g["lr"] for g in made.param_groups} == {
        kind: pytest.approx(rate / 4) for kind, rate in wanted.items()
    }
    assert getattr(made, "noise_std", 0.7) == 0.7
    optimised = {id(p) for g in made.param_groups for p in g["params"]}
    assert optimised == {id(p) for n, p in named.items() if "fixed" not in n}
