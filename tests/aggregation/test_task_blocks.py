"""SD-LoRA, DualLoRA and BeamLoRA server rules, compared with dense loops."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import make_config
from lalora_app.adapter.factors import Adapter, factor_pairs, kind, select, sibling
from lalora_app.adapter.parametrisations import (
    add_gates,
    add_task_basis,
    add_task_directions,
    factors_with_task_directions,
    fixed_b_name,
    rank_mask_name,
    rank_of_task,
    split_rows_by_basis,
)
from lalora_app.aggregation.beam_pruning import prune_and_expand
from lalora_app.aggregation.rule import Aggregated, RoundInfo
from lalora_app.aggregation.task_blocks import finished_task, freeze_direction, freeze_subspace

HEAD = "base_model.model.classifier.weight"
SIZES = {"base_model.model.layer.0": (9, 17), "base_model.model.layer.1": (16, 13)}
LAYERS = [(f"{path}.lora_B.weight", f"{path}.lora_A.weight") for path in SIZES]
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=15, deadline=None, derandomize=True)
AB = frozenset("AB")


@cache
def numbers(**changes):
    return make_config(**{f"rule.{key.replace('_', '-')}": v for key, v in changes.items()}).rule


def at(t: int, rounds: int, **changes) -> RoundInfo:
    return RoundInfo(t=t, rounds=rounds, seed=7, numbers=numbers(**changes))


def plain(rng: np.random.Generator, rank: int) -> Adapter:
    adapter = {HEAD: rng.standard_normal((2, 5))}
    for (m, n), (b, a) in zip(SIZES.values(), LAYERS, strict=True):
        adapter |= {a: rng.standard_normal((rank, n)), b: np.zeros((m, rank))}
    return {name: array.astype(np.float32) for name, array in adapter.items()}


def uploads_of(rng: np.random.Generator, current: Adapter, clients: int = 2) -> list[Adapter]:
    """Return uploads with new values for all tensors except fixed ones."""
    travels = select(current, AB)
    assert not any(kind(name) == "fixed" for name in travels)
    return [
        {n: rng.standard_normal(x.shape).astype(np.float32) for n, x in travels.items()}
        for _ in range(clients)
    ]


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def mean_of(uploads: list[Adapter], weights: list[float], current: Adapter) -> Adapter:
    shares = [weight / sum(weights) for weight in weights]
    return {
        n: sum(p * wide(up[n]) for p, up in zip(shares, uploads, strict=True))
        if n in uploads[0]
        else wide(x)
        for n, x in current.items()
    }


def assert_near(found: np.ndarray, expected: np.ndarray, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= relative * max(np.linalg.norm(expected), 1e-30)


# The last round of each task.


def tasks_of(rounds: int, tasks: int) -> list[int]:
    """Return per round the task i with the round's start in [i, i + 1)/tasks of the run."""
    found = []
    for done in range(rounds):
        (task,) = [i for i in range(tasks) if i * rounds <= done * tasks < (i + 1) * rounds]
        found.append(task)
    return found


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 7, 12, 20])
def test_a_task_ends_in_its_last_round_and_the_last_task_never_ends(tasks):
    for rounds in range(1, 26):
        wanted = tasks_of(rounds, tasks)
        ends = [one if one != next_one else None for one, next_one in pairwise([*wanted, None])]
        expected = [*ends[:-1], None]
        found = [finished_task(at(t, rounds, tasks=tasks)) for t in range(1, rounds + 1)]
        assert found == expected, rounds
        closed = [task for task in found if task is not None]
        assert all(
            task < tasks - 1 for task in closed
        )  # all blocks of frozen directions are in use
        assert len(set(closed)) == len(closed)
        if tasks <= rounds:
            assert closed == list(range(tasks - 1))
            lengths = [wanted.count(task) for task in range(tasks)]
            assert max(lengths) - min(lengths) <= 1
        else:
            assert len(closed) == rounds - 1  # as many tasks as rounds, or more


# SD-LoRA.


def directed_product(theta: Adapter, b: str, a: str, tasks: int) -> np.ndarray:
    """Return B·A + Σ α_i·B̂_i·Â_i, summed per task and direction."""
    total = wide(theta[b]) @ wide(theta[a])
    rank = len(theta[a])
    left, right = wide(theta[fixed_b_name(b)]), wide(theta[sibling(a, "fixed")])
    for task in range(tasks - 1):
        for j in range(task * rank, (task + 1) * rank):
            total += float(theta[sibling(a, "gate")][task]) * np.outer(left[:, j], right[j])
    return total


def sd_start(rng: np.random.Generator, rank: int, tasks: int) -> Adapter:
    return add_task_directions(plain(rng, rank * tasks), numbers(tasks=tasks))


@pytest.mark.parametrize(("rank", "tasks", "rounds"), [(2, 3, 3), (1, 4, 6), (3, 2, 5), (2, 5, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_sd_lora_freezes_the_product_as_normalised_directions(rank, tasks, rounds, seed):
    rng = np.random.default_rng(seed)
    current, weights, frozen = sd_start(rng, rank, tasks), [1.0, 3.0], []
    for t in range(1, rounds + 1):
        info = at(t, rounds, tasks=tasks)
        uploads = uploads_of(rng, current)
        mean = mean_of(uploads, weights, current)
        result = freeze_direction(current, weights, uploads, info)
        assert not result.fold
        new, task = result.adapter, finished_task(info)
        assert_near(new[HEAD], mean[HEAD])
        for b, a in LAYERS:
            before, after = (directed_product(x, b, a, tasks) for x in (mean, new))
            assert_near(after, before)
            left, right, gate = fixed_b_name(b), sibling(a, "fixed"), sibling(a, "gate")
            if task is None:
                assert_near(new[a], mean[a])
                assert new[left] is current[left]
                assert new[right] is current[right]
                continue
            place = slice(task * rank, (task + 1) * rank)
            sizes = [np.linalg.norm(mean[name]) for name in (b, a)]
            assert_near(new[left][:, place], mean[b] / sizes[0])
            assert_near(new[right][place], mean[a] / sizes[1])
            assert np.linalg.norm(new[left][:, place]) == pytest.approx(1, rel=1e-5)
            assert np.linalg.norm(new[right][place]) == pytest.approx(1, rel=1e-5)
            assert new[gate][task] == pytest.approx(sizes[0] * sizes[1], rel=1e-5)
            others = np.arange(tasks - 1) != task
            np.testing.assert_allclose(new[gate][others], mean[gate][others], rtol=1e-5)
            rest = np.repeat(others, rank)
            np.testing.assert_array_equal(new[left][:, rest], current[left][:, rest])
            np.testing.assert_array_equal(new[right][rest], current[right][rest])
            assert not new[b].any()
            assert np.abs(new[a]).max() <= new[a].shape[1] ** -0.5
            assert np.abs(wide(new[a]) - mean[a]).max() > 1e-2
        frozen += [] if task is None else [task]
        current = new
    assert frozen


@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
def test_a_zero_product_freezes_to_zero_without_dividing_by_it(zero):
    rng = np.random.default_rng(0)
    current = sd_start(rng, 2, 2)
    (upload,) = uploads_of(rng, current, clients=1)
    upload |= {name: np.zeros_like(x) for name, x in upload.items() if zero in name}
    new = freeze_direction(current, [1.0], [upload], at(1, 2, tasks=2)).adapter
    for b, a in LAYERS:
        assert not directed_product(new, b, a, 2).any()
    assert all(np.isfinite(array).all() for array in new.values())


def after_first_task(rng: np.random.Generator, tolerance: float) -> tuple[Adapter, RoundInfo]:
    """Return an adapter with one frozen direction, and the round that ends the second task."""
    current = sd_start(rng, 2, 3)
    (upload,) = uploads_of(rng, current, clients=1)
    first = freeze_direction(current, [1.0], [upload], at(1, 3, tasks=3)).adapter
    return first, at(2, 3, tasks=3, merge_tolerance=tolerance)


@pytest.mark.parametrize(
    ("noise", "tolerance", "merged"), [(0, 0.01, 1), (0.5, 0.01, 0), (0, 0, 0)]
)
def test_sd_lora_replaces_a_direction_by_earlier_ones_only_if_they_are_near(
    noise, tolerance, merged
):
    rng = np.random.default_rng(1)
    current, info = after_first_task(rng, tolerance)
    (upload,) = uploads_of(rng, current, clients=1)
    for b, a in LAYERS:  # the new product is -1.5 times the frozen one, with or without a change
        upload[b] = (-1.5 * current[fixed_b_name(b)][:, :2]).astype(np.float32)
        upload[a] = current[sibling(a, "fixed")][:2] + np.float32(noise) * upload[a]
    mean = mean_of([upload], [1.0], current)
    new = freeze_direction(current, [1.0], [upload], info).adapter
    for b, a in LAYERS:
        before, after = (directed_product(x, b, a, 3) for x in (mean, new))
        scale = np.linalg.norm(before)
        assert np.linalg.norm(after - before) <= 1e-5 * scale
        assert bool(new[fixed_b_name(b)][:, 2:].any()) is not bool(merged)
        gate = new[sibling(a, "gate")]
        if merged:
            assert gate[0] == pytest.approx(mean[sibling(a, "gate")][0] - 1.5, rel=1e-4)
            assert gate[1] == mean[sibling(a, "gate")][1]


@FEW
@given(seed=SEEDS, tolerance=st.floats(0.01, 0.99))
def test_what_a_replaced_direction_loses_is_below_the_tolerance(seed, tolerance):
    rng = np.random.default_rng(seed)
    current, info = after_first_task(rng, tolerance)
    (upload,) = uploads_of(rng, current, clients=1)
    for b, a in LAYERS:
        upload[b] += 4 * current[fixed_b_name(b)][:, :2]
        upload[a] += 4 * current[sibling(a, "fixed")][:2]
    mean = mean_of([upload], [1.0], current)
    new = freeze_direction(current, [1.0], [upload], info).adapter
    for b, a in LAYERS:
        frozen = wide(current[fixed_b_name(b)][:, :2]) @ wide(current[sibling(a, "fixed")][:2])
        own = wide(mean[b]) @ wide(mean[a])
        share = np.vdot(frozen, own) / np.vdot(frozen, frozen)
        left = np.linalg.norm(own - share * frozen) / np.linalg.norm(own)
        assume(abs(left - tolerance) > 1e-4)
        replaced = not new[fixed_b_name(b)][:, 2:].any()
        assert replaced is bool(left < tolerance)
        lost = directed_product(new, b, a, 3) - directed_product(mean, b, a, 3)
        assert np.linalg.norm(lost) <= (left + 1e-4 if replaced else 1e-4) * np.linalg.norm(own)


def test_sd_lora_trains_fewer_directions_in_each_later_task():
    import torch

    rng, decay = np.random.default_rng(2), {"tasks": 3, "task_rank_decay": 0.5}
    rule = numbers(**decay)
    current = add_task_directions(plain(rng, 4 * 3), rule)
    for task, rank in enumerate((4, 2, 1)):  # halved and rounded up
        (upload,) = uploads_of(rng, current, clients=1)
        mean = mean_of([upload], [1.0], current)
        for b, a in LAYERS:
            assert current[rank_mask_name(b)].tolist() == [1.0] * rank + [0.0] * (4 - rank)
            mean[a] = mean[a] * current[rank_mask_name(b)][:, None]
        theta = {n: torch.from_numpy(x) for n, x in (current | upload).items()}
        tensors = factors_with_task_directions(theta, rule)
        new = freeze_direction(current, [1.0], [upload], at(task + 1, 3, **decay)).adapter
        for b, a in LAYERS:
            expected = directed_product(mean, b, a, 3)
            assert_near((tensors[b] @ tensors[a]).numpy(), expected)
            if task < 2:
                assert_near(directed_product(new, b, a, 3), expected)
        current = new


def test_the_rank_of_a_task_is_rounded_up_and_never_zero():
    assert [rank_of_task(10, i, numbers(task_rank_decay=0.8)) for i in range(3)] == [10, 8, 7]
    assert rank_of_task(8, 50, numbers(task_rank_decay=0.1)) == 1
    assert rank_of_task(8, 50, numbers(task_rank_decay=1.0)) == 8
    assert rank_mask_name(LAYERS[0][0]) not in sd_start(np.random.default_rng(0), 2, 2)


# DualLoRA.


def projected_product(theta: Adapter, b: str, a: str) -> np.ndarray:
    """Return B·A, with half of A's rows projected out of the basis and the other half onto it."""
    rows, basis, half = wide(theta[a]), wide(theta[sibling(a, "fixed")]), len(theta[a]) // 2
    for i in range(len(rows)):
        inside = sum((phi @ rows[i]) * phi for phi in basis)
        if i < half:
            rows[i] = rows[i] - inside
        elif basis.any():
            rows[i] = inside
    return wide(theta[b]) @ rows


def assert_orthonormal_or_zero(basis: np.ndarray) -> None:
    gram = wide(basis) @ wide(basis).T
    diagonal = (np.abs(wide(basis)).max(axis=1) > 0).astype(float)
    np.testing.assert_allclose(gram, np.diag(diagonal), atol=2e-6)


def assert_closed(new: Adapter, current: Adapter, fold: Adapter, task: int) -> None:
    """Check that the basis is orthonormal, changed in the task's rows only, and spans the fold."""
    for b, a in LAYERS:
        name, rank = sibling(a, "fixed"), len(new[a])
        basis = new[name]
        assert_orthonormal_or_zero(basis)
        rest = np.ones(len(basis), bool)
        rest[task * rank : (task + 1) * rank] = False
        np.testing.assert_array_equal(basis[rest], current[name][rest])
        product, span = wide(fold[b]) @ wide(fold[a]), wide(basis).T @ wide(basis)
        assert np.linalg.norm(product - product @ span) <= 1e-4 * np.linalg.norm(product)
        outside, inside = (wide(part) for part in split_rows_by_basis(new[a], basis))
        if len(outside):
            assert np.abs(outside @ basis.T).max() <= 1e-5
            assert np.linalg.norm(outside) > 1e-3
        assert np.linalg.norm(inside - inside @ span) <= 1e-5


@pytest.mark.parametrize(("rank", "tasks", "rounds"), [(2, 4, 4), (4, 3, 5), (3, 3, 3), (1, 3, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_duallora_adds_the_product_to_the_base_and_its_rows_to_the_basis(rank, tasks, rounds, seed):
    rng = np.random.default_rng(seed)
    current = add_task_basis(plain(rng, rank), numbers(tasks=tasks))
    weights, closed = [2.0, 1.0], 0
    for t in range(1, rounds + 1):
        info = at(t, rounds, tasks=tasks)
        uploads = uploads_of(rng, current)
        mean = mean_of(uploads, weights, current)
        result: Aggregated = freeze_subspace(current, weights, uploads, info)
        new, task = result.adapter, finished_task(info)
        for b, a in LAYERS:
            before, after = (projected_product(x, b, a) for x in (mean, new))
            if task is not None:
                after = after + wide(result.fold[b]) @ wide(result.fold[a])
            assert_near(after, before)
        if task is None:
            assert not result.fold
        else:
            assert set(result.fold) == {name for layer in LAYERS for name in layer}
            assert_closed(new, current, result.fold, task)
            closed += 1
        current = new
    assert closed == tasks - 1


def test_rows_inside_the_basis_add_no_direction():
    """Half of the task's rows are inside the basis, so only the other half adds directions."""
    rng, rank, tasks = np.random.default_rng(0), 4, 4
    current = add_task_basis(plain(rng, rank), numbers(tasks=tasks))
    for t in range(1, tasks):
        result = freeze_subspace(current, [1.0], uploads_of(rng, current, 1), at(t, 4, tasks=tasks))
        current = result.adapter
    for _, a in LAYERS:
        blocks = current[sibling(a, "fixed")].reshape(tasks - 1, rank, -1)
        assert [int(block.any(axis=1).sum()) for block in blocks] == [4, 2, 2]


@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
def test_a_zero_product_adds_no_direction(zero):
    rng = np.random.default_rng(1)
    current = add_task_basis(plain(rng, 2), numbers(tasks=3))
    (upload,) = uploads_of(rng, current, clients=1)
    upload |= {name: np.zeros_like(x) for name, x in upload.items() if zero in name}
    new = freeze_subspace(current, [1.0], [upload], at(1, 3, tasks=3)).adapter
    assert not any(new[sibling(a, "fixed")].any() for _, a in LAYERS)


def test_a_product_of_lower_rank_adds_as_many_directions_as_its_rank():
    rng = np.random.default_rng(2)
    current = add_task_basis(plain(rng, 3), numbers(tasks=2))
    (upload,) = uploads_of(rng, current, clients=1)
    for b, _ in LAYERS:
        upload[b][:, 1:] = upload[b][:, :1]
    new = freeze_subspace(current, [1.0], [upload], at(1, 2, tasks=2)).adapter
    for _, a in LAYERS:
        basis = new[sibling(a, "fixed")]
        assert int(basis.any(axis=1).sum()) == 1
        assert_orthonormal_or_zero(basis)


def test_a_basis_of_the_whole_space_does_not_grow():
    rng, rank, tasks = (
        np.random.default_rng(3),
        8,
        6,
    )  # 40 possible directions in layers with 17 and 13 inputs
    current = add_task_basis(plain(rng, rank), numbers(tasks=tasks))
    for t in range(1, tasks):
        info, uploads = at(t, tasks, tasks=tasks), uploads_of(rng, current, 1)
        current = freeze_subspace(current, [1.0], uploads, info).adapter
    for (_, n), (_, a) in zip(SIZES.values(), LAYERS, strict=True):
        basis = current[sibling(a, "fixed")]
        assert int(basis.any(axis=1).sum()) == n
        assert_orthonormal_or_zero(basis)


@pytest.mark.parametrize(
    ("rule", "start"), [(freeze_direction, add_task_directions), (freeze_subspace, add_task_basis)]
)
@pytest.mark.parametrize(("tasks", "rounds"), [(7, 3), (3, 1), (1, 3), (5, 4)])
def test_any_number_of_tasks_works_with_any_number_of_rounds(rule, start, tasks, rounds):
    rng = np.random.default_rng(0)
    current = start(plain(rng, tasks), numbers(tasks=tasks))
    shapes = {name: array.shape for name, array in current.items()}
    for t in range(1, rounds + 1):
        info = at(t, rounds, tasks=tasks)
        uploads = uploads_of(rng, current)
        kept = {name: array.copy() for name, array in current.items()}
        new = rule(current, [1.0, 1.0], uploads, info).adapter
        assert all(np.array_equal(current[name], array) for name, array in kept.items())
        current = new
        assert {name: array.shape for name, array in current.items()} == shapes
        assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in current.values())


# BeamLoRA.


def shares_of(gate: np.ndarray, temperature: float) -> list[float]:
    powers = np.exp(wide(gate) / temperature - np.max(wide(gate) / temperature))
    return list(powers / powers.sum())


def expanded(merged: Adapter, temperature: float) -> tuple[Adapter, list[int]]:
    """Copy directions of high gate over those of low gate; also return the number per layer."""
    new, counts = {n: wide(x) for n, x in merged.items()}, []
    for b, a in factor_pairs(merged):
        gate = sibling(a, "gate")
        shares = shares_of(merged[gate], temperature)
        rank, ranked = len(shares), sorted(range(len(shares)), key=lambda i: -shares[i])
        sums = [sum(shares[i] for i in ranked[:k]) for k in range(1, rank + 1)]
        assume(
            min(abs(total - 0.95) for total in sums) > 1e-5
        )  # float32 may round to the other side
        kept = min(k for k in range(1, rank + 1) if sums[k - 1] >= 0.95)
        kept = max(kept, rank - rank // 2)
        for place in range(rank - kept):
            strong, weak = ranked[place], ranked[rank - 1 - place]
            new[a][weak], new[b][:, weak] = merged[a][strong], merged[b][:, strong]
            middle = (float(merged[gate][strong]) + float(merged[gate][weak])) / 2
            new[gate][strong] = new[gate][weak] = middle
        counts.append(rank - kept)
    return new, counts


def beam_case(seed: int, rank: int, spread: float) -> tuple[Adapter, list[Adapter]]:
    rng = np.random.default_rng(seed)
    current = add_gates(plain(rng, rank), numbers())
    uploads = uploads_of(rng, current)
    for upload in uploads:
        upload |= {n: np.float32(spread) * x for n, x in upload.items() if kind(n) == "gate"}
    return current, uploads


@given(
    seed=SEEDS,
    rank=st.integers(1, 12),
    spread=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    temperature=st.sampled_from([0.05, 0.5, 2.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_directions_of_low_gate_become_copies_of_directions_of_high_gate(
    seed, rank, spread, temperature
):
    current, uploads = beam_case(seed, rank, spread)
    info = at(4, 9, period=2, gate_temperature=temperature)
    mean = mean_of(uploads, [1.0, 2.0], current)
    merged = {name: array.astype(np.float32) for name, array in mean.items()}
    expected, counts = expanded(merged, temperature)
    result = prune_and_expand(current, [1.0, 2.0], uploads, info)
    assert not result.fold
    assert max(counts) <= rank // 2
    for name, array in expected.items():
        assert result.adapter[name].dtype == np.float32
        np.testing.assert_allclose(result.adapter[name], array, rtol=1e-5, atol=1e-6)


def test_at_most_half_of_the_directions_are_pruned():
    current, uploads = beam_case(0, 5, 0.0)
    for _, a in LAYERS:
        for upload in uploads:
            upload[sibling(a, "gate")] = np.array([1, 2, 99, 3, 4], np.float32)
    new = prune_and_expand(current, [1.0, 1.0], uploads, at(1, 9)).adapter
    merged = mean_of(uploads, [1.0, 1.0], current)
    for b, a in LAYERS:
        source = [2, 4, 2, 3, 4]  # the weakest becomes the strongest, the next the second strongest
        assert_near(new[a], merged[a][source])
        assert_near(new[b], merged[b][:, source])
        np.testing.assert_array_equal(new[sibling(a, "gate")], [50, 3, 50, 3, 3])


@pytest.mark.parametrize("rank", [1, 2, 8, 19, 20, 21, 40, 64, 100])
def test_equal_gates_prune_nothing_at_any_rank(rank):
    current, uploads = beam_case(1, rank, 0.0)
    new = prune_and_expand(current, [1.0, 1.0], uploads, at(1, 9)).adapter
    merged = mean_of(uploads, [1.0, 1.0], current)
    for name, array in merged.items():
        np.testing.assert_array_equal(new[name], array.astype(np.float32))


def test_a_gate_equal_to_the_lowest_kept_gate_is_kept():
    current, uploads = beam_case(2, 30, 0.0)
    gate = np.zeros(30, np.float32)
    gate[:10] = -20.0  # the other twenty have 5 % each
    for _, a in LAYERS:
        for upload in uploads:
            upload[sibling(a, "gate")] = gate
    new = prune_and_expand(current, [1.0, 1.0], uploads, at(1, 9)).adapter
    merged = mean_of(uploads, [1.0, 1.0], current)
    for _, a in LAYERS:
        changed = [i for i in range(30) if np.abs(new[a][i] - merged[a][i]).max() > 1e-5]
        assert changed == list(range(10))


def test_beamlora_only_averages_within_a_period():
    current, uploads = beam_case(3, 6, 3.0)
    merged = mean_of(uploads, [1.0, 1.0], current)
    for t in range(1, 8):
        result = prune_and_expand(current, [1.0, 1.0], uploads, at(t, 9, period=3))
        same = all(np.allclose(result.adapter[n], x, atol=1e-6) for n, x in merged.items())
        assert same == (t % 3 != 0), t


@pytest.mark.parametrize(("period", "kept"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_copies_are_of_the_snapshot_half_a_period_before(period, kept):
    """Round by round, with the rule's memory carried from one round to the next."""
    current, memory = beam_case(4, 6, 0.0)[0], {}
    for t in range(1, 2 * period + 1):
        uploads = beam_case(10 + t, 6, 3.0)[1]
        merged = mean_of(uploads, [1.0, 1.0], current)
        if t % period == kept:
            snapshot = merged
        info = replace(at(t, 99, period=period), memory=memory)
        result = prune_and_expand(current, [1.0, 1.0], uploads, info)
        if t % period == 0:
            copied = merged | {n: snapshot[n] for pair in LAYERS for n in pair}
            assert_copied(result.adapter, merged, copied)
            assert result.memory == {}
        current, memory = result.adapter, result.memory


def assert_copied(new: Adapter, merged, source) -> None:
    """Weak directions of ``merged`` are the strong ones of ``source``, and all others stay."""
    changed = 0
    for b, a in LAYERS:
        order = sorted(range(6), key=lambda i: -merged[sibling(a, "gate")][i])
        for place, strong in enumerate(order[:3]):
            weak = order[5 - place]
            stays = np.allclose(new[a][weak], merged[a][weak], atol=1e-6)
            wanted = merged[a][weak] if stays else source[a][strong]
            assert_near(new[a][weak], wanted)
            assert_near(new[b][:, weak], merged[b][:, weak] if stays else source[b][:, strong])
            assert_near(new[a][strong], merged[a][strong])
            changed += not stays
    assert changed


def test_with_a_period_of_one_copies_are_of_the_present_factors():
    current, uploads = beam_case(0, 6, 3.0)
    old = {n: 0 * x for n, x in current.items()}
    plain = prune_and_expand(current, [1.0, 1.0], uploads, at(1, 9))
    other = prune_and_expand(current, [1.0, 1.0], uploads, replace(at(1, 9), memory=old))
    assert plain.memory == other.memory == {}
    for name, array in plain.adapter.items():
        np.testing.assert_array_equal(other.adapter[name], array)
