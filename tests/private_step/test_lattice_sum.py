"""A client's part of a private sum: integers of a Poisson batch, with a share of the noise."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.gaussians import assert_gaussian
from lalora_app.blocks.adapters import wire_name
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.models.backbone import Backbone, build
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import BudgetError
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step.step import private_integers
from lalora_app.shared_noise.lattice import Constants, Lattice
from lalora_app.shared_noise.seeded import new_seeds, share
from lalora_app.shared_noise.shares import Cohort

EXAMPLES, UNIT, CLIP = 8, 2.0**-20, 0.05
COHORT = Cohort(4, 3)


@pytest.fixture
def backbone(tiny):
    """Return a model with all tensors active and random; with B = 0, A would have no gradient."""
    model, start = build(tiny())
    rng = np.random.default_rng(0)
    model.load({n: rng.normal(0, 0.5, a.shape).astype(np.float32) for n, a in start.items()})
    model.engine.activate(frozenset(model.engine.parameters))
    yield model
    model.load(start)


@pytest.fixture
def data(tiny, backbone) -> EncodedTexts:
    encoded = backbone.encode(split(tiny().data)[0])
    return EncodedTexts(encoded.tokens[:EXAMPLES], encoded.labels[:EXAMPLES], encoded.pad)


def lattice_for(backbone: Backbone, rate: float, multiplier: float, extra: int = 0) -> Lattice:
    entries = sum(p.numel() for p in backbone.engine.parameters.values()) + extra
    run = Constants(CLIP, multiplier, rate, 32, entries, 4, 3.0, 1e-5, COHORT)
    return Lattice(run, UNIT, 64)


def loop_sum(backbone: Backbone, data: EncodedTexts, drawn: np.ndarray) -> np.ndarray:
    """Σ min(1, C/‖g_i‖)·g_i by autograd, one example at a time, tensors sorted by name."""
    model = copy.deepcopy(backbone.model)
    for module in model.modules():
        vars(module).pop("forward", None)
    plain, total = replace(backbone, model=model), 0.0
    for i in drawn:
        model.zero_grad()
        plain.losses(data.batch([i])).sum().backward()
        trained = {wire_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
        grad = torch.cat([trained[n].double().flatten() for n in sorted(trained)]).numpy()
        total = total + grad * min(1.0, CLIP / np.linalg.norm(grad))
    return np.asarray(total)


def integers(backbone, data, *, rate=0.5, multiplier=0.0, seeds=None, seed=0, **changes):
    lattice = changes.pop("lattice", None) or lattice_for(backbone, rate, multiplier)
    given = {
        "reservation": Reservation(Release(rate, multiplier, 1)),
        "lattice": lattice,
        "seeds": seeds or new_seeds(COHORT),
        "micro_batch": 3,
        "sampling": seeded(seed, "sampling"),
    }
    return private_integers(backbone, data, **{**given, **changes})


def test_without_noise_it_is_the_rounded_sum_of_clipped_gradients_of_the_batch(backbone, data):
    drawn = np.flatnonzero(seeded(0, "sampling").random(EXAMPLES) < 0.5)
    assert 1 < len(drawn) < EXAMPLES
    expected = loop_sum(backbone, data, drawn)
    found = integers(backbone, data)
    assert found.dtype == np.int64
    assert np.abs(found * UNIT - expected).max() < UNIT / 2 + 1e-6
    assert np.linalg.norm(expected) > CLIP / 2


def test_the_share_of_the_noise_is_added_and_has_the_variance_of_its_components(backbone, data):
    lattice, clean, noise = lattice_for(backbone, 0.5, 2.0), integers(backbone, data), []
    for _ in range(16):
        seeds = new_seeds(COHORT)
        noise.append(integers(backbone, data, multiplier=2.0, seeds=seeds) - clean)
        assert np.array_equal(noise[-1], share(seeds, lattice))
    whole = math.sqrt(float(sum(COHORT.fractions)))
    assert_gaussian(np.concatenate(noise) / lattice.noise_std, whole)


def test_an_empty_batch_is_noise_alone_and_uses_up_the_reservation(backbone, data):
    reservation, seeds = Reservation(Release(1e-9, 2.0, 1)), new_seeds(COHORT)
    arguments = {"rate": 1e-9, "multiplier": 2.0, "seeds": seeds, "reservation": reservation}
    found = integers(backbone, data, **arguments)
    assert np.array_equal(found, share(seeds, lattice_for(backbone, 1e-9, 2.0)))
    with pytest.raises(BudgetError):
        integers(backbone, data, **arguments)


@pytest.mark.parametrize(("rate", "multiplier"), [(0.5, 1.9), (0.4, 2.0)])
def test_another_rate_or_noise_than_the_ledgers_is_an_error_and_takes_nothing(
    backbone, data, rate, multiplier
):
    reservation = Reservation(Release(0.5, 2.0, 1))
    with pytest.raises(ValueError, match="of the ledger"):
        integers(
            backbone,
            data,
            reservation=reservation,
            lattice=lattice_for(backbone, rate, multiplier),
        )
    reservation.take()


def test_an_upload_of_another_size_than_the_sensitivity_counts_is_an_error(backbone, data):
    with pytest.raises(ValueError, match="entries"):
        integers(backbone, data, lattice=lattice_for(backbone, 0.5, 0.0, extra=-1))
