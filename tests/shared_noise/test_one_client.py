"""Clients with shared noise against one client with all data and the same noise, in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lalora_app.private_step.gradients import FlatBlock, PerExampleGrads, StoredShape
from lalora_app.private_step.mechanism import add_noise, clipped_sum
from lalora_app.shared_noise.lattice import Constants, choose, mean, to_lattice, to_words
from lalora_app.shared_noise.seeded import new_seeds, share, without_excess
from lalora_app.shared_noise.shares import Cohort

ENTRIES, STEPS, RATE = 30, 6, 0.3


@dataclass
class Given:
    """A generator whose normal numbers are given."""

    numbers: np.ndarray

    def standard_normal(self, size: int) -> np.ndarray:
        assert size == self.numbers.size
        return self.numbers


def sum_of(rows: np.ndarray, clip_norm: float) -> dict[str, torch.Tensor]:
    """The clipped sum of the app's own mechanism."""
    block = FlatBlock({"w": StoredShape((ENTRIES,))}, torch.from_numpy(rows.copy()))
    return clipped_sum(PerExampleGrads((block,)), clip_norm)


def gradients(weights: np.ndarray, data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Per-example gradients of a linear regression, (examples, entries)."""
    inputs, targets = data
    return (inputs @ weights - targets)[:, None] * inputs


@pytest.mark.parametrize(
    ("cohort", "missing"), [(Cohort(4, 3), 0), (Cohort(20, 14, 2), 0), (Cohort(20, 14, 2), 6)]
)
def test_clients_with_shared_noise_equal_one_client_with_all_data(cohort, missing):
    rng, sizes = np.random.default_rng(5), np.arange(cohort.clients) % 7 + 20
    run = Constants(0.7, 1.1, RATE, int(sizes.sum()), ENTRIES, STEPS, 3.0, 1e-5, cohort)
    lattice, batch, present = choose(run), run.expected_batch, range(missing, cohort.clients)
    data = [(rng.standard_normal((m, ENTRIES)), rng.standard_normal(m)) for m in sizes]
    shared, central = np.zeros(ENTRIES), np.zeros(ENTRIES)
    first = cohort.needed(missing) + 1
    bound = cohort.clients / 2 * lattice.unit / batch * (1 + 1e-9)  # of each entry of the mean
    for _ in range(STEPS):
        chosen = [rng.random(m) < RATE for m in sizes]
        total, revealed, noise = to_words(np.zeros(ENTRIES, np.int64), lattice.word), {}, 0
        at_shared, at_central = (
            [gradients(w, (x[c], y[c])) for (x, y), c in zip(data, chosen, strict=True)]
            for w in (shared, central)
        )
        for i in present:
            seeds = new_seeds(cohort)
            own = to_lattice(sum_of(at_shared[i], 0.7)["w"].numpy(), lattice.unit)
            total = total + to_words(own + share(seeds, lattice), lattice.word)
            revealed |= {i: seeds[first]} if first < len(seeds) else {}
            noise = noise + share(seeds, lattice)
        found = mean(without_excess(total, revealed, missing, lattice), lattice, batch)
        kept = to_words(noise, lattice.word)
        kept = mean(
            without_excess(kept, revealed, missing, lattice), lattice, lattice.unit
        )  # integers
        std = lattice.noise_std * lattice.unit
        given = Given(kept * lattice.unit / std)

        def whole(parts, given=given, std=std):
            sums = sum_of(np.concatenate([parts[i] for i in present]), 0.7)
            return add_noise(sums, noise_std=std, expected_batch=batch, rng=given)["w"].numpy()

        assert np.abs(found - whole(at_shared)).max() <= bound
        shared, central = shared - 0.5 * found, central - 0.5 * whole(at_central)
    assert np.abs(shared).max() > 0.01
    assert np.abs(shared - central).max() <= 4 * STEPS * bound  # 0.5·bound a step, and its growth
