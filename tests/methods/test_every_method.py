"""Properties of every method in METHODS: sensitivity, noise, products, export, ranks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import app_runs
from helpers.app_runs import arrays, local_steps, open_run, run, tokens_of
from helpers.fake_grid import FakeGrid
from helpers.gaussians import assert_gaussian, flat
from lalora_app import server_app
from lalora_app.adapter.factors import active_names, factor_pairs, kind
from lalora_app.client import local_round
from lalora_app.data.encoding import EncodedTexts
from lalora_app.data.examples import split
from lalora_app.methods.table import METHODS
from lalora_app.models.backbone import build
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seeded
from lalora_app.private_step import step
from lalora_app.settings.errors import ConfigError
from lalora_app.wire import messages, tensors

pytestmark = [pytest.mark.wide, pytest.mark.usefixtures("no_waiting", "no_report")]

EXAMPLES, CLIP = 8, 0.05


def midway(start, seed=0):
    """Return an adapter as in the middle of a run, without zero tensors."""
    rng = np.random.default_rng(seed)
    noisy = {n: (x + 0.3 * rng.standard_normal(x.shape)).astype("f4") for n, x in start.items()}
    return noisy | {n: (x != 0).astype("f4") for n, x in noisy.items() if ".ranks." in n}


@pytest.fixture(params=list(METHODS))
def method(request):
    return request.param


@pytest.fixture
def client(tiny, method):
    """Return a client's model in the middle of a run of the method, and a few examples."""
    config = tiny(method=method)
    model, start = build(config)
    model.load(midway(start))
    encoded = model.encode(split(config.data)[0])
    data = EncodedTexts(encoded.tokens[:EXAMPLES], encoded.labels[:EXAMPLES], encoded.pad)
    return config, model, start, data


def released(client, data, *, t, k, z=0.0, seed=0):
    """Return the noised mean gradient of step ``k`` of round ``t``, as in a client's round."""
    config, model, start, _ = client
    local = local_steps(config, t)
    model.engine.activate(active_names(start, local.method.trains(t, k)))
    with model.frozen_weights.perturbed(local_round._perturbation(model, local, k)):
        return step.private_gradient(
            model,
            data,
            reservation=Reservation(Release(1.0, z, 1)),
            clip_norm=CLIP,
            micro_batch=3,
            streams=step.RandomStreams(seeded(seed, "sampling"), seeded(seed, "noise")),
        )


@pytest.mark.parametrize(("t", "k"), [(1, 0), (1, 1), (2, 0)])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(client, t, k):
    data = client[3]
    whole = EXAMPLES * flat(released(client, data, t=t, k=k))
    moved = []
    for left_out in range(EXAMPLES):
        rest = [i for i in range(EXAMPLES) if i != left_out]
        tokens, labels = (tuple(side[i] for i in rest) for side in (data.tokens, data.labels))
        neighbour = EncodedTexts(tokens, labels, data.pad)
        less = (EXAMPLES - 1) * flat(released(client, neighbour, t=t, k=k))
        moved.append(np.linalg.norm(whole - less))
    assert max(moved) <= CLIP * (1 + 1e-4)
    assert max(moved) > 0.9 * CLIP  # the gradient is clipped, so the bound does not hold by chance


def test_every_active_tensor_gets_the_runs_noise_and_nothing_else_does(client, method):
    z, t, k = 3.0, 1, 0
    data = client[3]
    clean = released(client, data, t=t, k=k)
    wanted = METHODS[method].trains(t, k) | {"head", "gate"}
    assert set(clean) == {name for name in client[2] if kind(name) in wanted}
    noise = {name: [] for name in clean}
    draws = 12 if METHODS[method].trains(t, k) else 120  # a head alone has few entries
    for seed in range(draws):
        for name, noised in released(client, data, t=t, k=k, z=z, seed=seed).items():
            noise[name].append((noised - clean[name]).double().numpy().ravel())
    together = np.concatenate([np.concatenate(parts) for parts in noise.values()])
    assert_gaussian(together, z * CLIP / EXAMPLES)
    for name, parts in noise.items():  # per tensor, with less statistical power
        ratio = np.concatenate(parts).std() / (z * CLIP / EXAMPLES)
        assert 1 / 2 < ratio < 2, name


def test_deers_clipping_norm_bounds_the_change_of_the_product(tiny):
    """‖ΔB·A‖_F ≤ C for the contribution of one example to B, in every downloaded state."""
    done = run(tiny(**open_run(method="deer", **{"num-server-rounds": 4})))
    for exchange in done.grid.trained():
        sent, t = exchange.start, exchange.order["round"]
        for b, a in factor_pairs(sent):
            resting = sent[a] if t % 2 else sent[b].T
            assert np.allclose(resting @ resting.T, np.eye(len(resting)), atol=1e-5)


MOVES = [
    name for name, entry in METHODS.items() if entry.moves_base or entry.effective or entry.whole
]


@pytest.mark.parametrize("name", MOVES)
def test_peft_loads_exported_drift_and_gates_with_the_reported_accuracy(tiny, name):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rates = {f"train.lr-{which}": 0.05 for which in ("a", "b", "w")}
    rates |= {"train.lr-head": 0.1, "train.batch-size": 60}
    config = tiny(**open_run(method=name) | rates)
    done = run(config)
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    inputs, labels = tokens_of(config, 1)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), done.folder.adapter).eval()
    state = done.folder.latest()
    model, _ = build(config)
    model.load(state.adapter, state.drift)
    own = model.encode(split(config.data)[1])
    with torch.no_grad():
        logits = stock(**inputs).logits
        # the original order: batches are sorted by length
        batch = own.batch(range(len(own)))
        assert torch.allclose(logits, model.logits(batch), atol=1e-4)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(done.json("summary.json")["accuracy"], abs=1e-6)
    if METHODS[name].moves_base:
        assert state.drift


def wide(product):
    return product.astype(np.float64)


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
def test_clients_of_different_ranks_are_aggregated_with_one_scale(tiny, name):
    changes = {"lora.ranks": "1,2,4", "lora.rank": 4, "lora.alpha": 8.0, "num-server-rounds": 2}
    config = tiny(**open_run(3, method=name, **changes))
    done = run(config, 3)
    ranks = [1, 2, 4]
    for exchange in done.grid.trained():
        for message in (exchange.request, exchange.reply):
            sent = arrays(message)
            for b, a in factor_pairs(sent):
                assert sent[a].shape[0] == sent[b].shape[1] == ranks[exchange.partition]
    first = done.grid.trained(1)
    second = done.grid.trained(2)[-1]
    whole = second.start  # the client of full rank has the global adapter
    drift = second.drift
    for b, a in factor_pairs(whole):
        scales = [config.lora.alpha / rank for rank in ranks]
        uploads = sorted(first, key=lambda e: e.partition)
        products = [
            scale * wide(arrays(e.reply)[b]) @ wide(arrays(e.reply)[a])
            for scale, e in zip(scales, uploads, strict=True)
        ]
        mean = sum(products) / 3
        new = config.lora.alpha / 4 * wide(whole[b]) @ wide(whole[a])
        if name == "flora":
            new = new + wide(drift[b]) @ wide(drift[a])
            assert np.linalg.norm(new - mean) < 1e-6 * np.linalg.norm(mean)
        if name == "flexlora":
            tail = np.linalg.svd(mean)[1][4:]
            lost = np.linalg.norm(new - mean)
            assert lost == pytest.approx(
                np.linalg.norm(tail), rel=1e-3, abs=1e-6 * np.linalg.norm(mean)
            )
    rows = done.rows
    assert rows[0]["aggregation_error"] is None
    if METHODS[name].exact:
        assert all(row["remaining_error"] < 1e-6 for row in rows)


def test_a_nodes_rank_must_not_exceed_the_rank_of_the_run(tiny):
    config = tiny(**open_run(method="flora"))
    grid = FakeGrid(config, [{"rank": 1}, {}])
    server_app.run(grid, config)
    shapes = {
        e.partition: [len(arrays(e.reply)[a]) for _, a in factor_pairs(arrays(e.reply))]
        for e in grid.trained()
    }
    assert {partition: set(found) for partition, found in shapes.items()} == {0: {1}, 1: {2}}
    for rank in (0, 3, "2", True):
        with pytest.raises(ConfigError, match="1 of 2 clients can take part"):
            server_app.run(FakeGrid(config, [{"rank": rank}, {}]), config)
    plain = tiny(**open_run(method="dp-lora"))
    with pytest.raises(ConfigError, match="1 of 2 clients can take part"):
        server_app.run(FakeGrid(plain, [{"rank": 1}, {}]), plain)


@pytest.mark.parametrize(("name", "rank"), [("la-lora", 1), ("la-lora", 99), ("flora", 99)])
def test_the_server_checks_a_clients_rank(tiny, name, rank):
    def fault(attempt, partition, reply):
        if attempt == 0 and partition == 1:
            reply.content[messages.CONFIG]["rank"] = rank
        return reply

    config = tiny(**open_run(method=name))
    grid = FakeGrid(config, 2, fault=fault)
    with pytest.raises(ConfigError, match=f"rank={rank} must be"):
        server_app.run(grid, config)
    assert grid.trained() == []


# Without factors there is no product, and nothing is measured.
EXACT = [name for name, entry in METHODS.items() if entry.exact and not entry.head_only]


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_have_no_aggregation_error(tiny, name):
    done = run(tiny(**open_run(method=name)))
    assert all(row["remaining_error"] < 1e-6 for row in done.rows)


@pytest.mark.parametrize("name", ["dp-lora", "la-lora-full", "lora-fair", "flexlora"])
def test_inexact_methods_report_their_aggregation_error(tiny, name):
    rates = {"train.lr-a": 0.05, "train.lr-b": 0.05, "train.batch-size": 60}
    rows = run(tiny(**open_run(method=name) | rates)).rows
    assert all(row["aggregation_error"] > 1e-6 for row in rows)
    for row in rows:
        assert row["aggregation_spectrum"] == sorted(row["aggregation_spectrum"], reverse=True)
        assert row["remaining_error"] <= row["aggregation_error"] * (1 + 1e-4)
        assert -1 <= row["update_cosine"] <= 1
    if name in ("dp-lora", "la-lora-full"):
        for row in rows:
            assert row["remaining_error"] == pytest.approx(row["aggregation_error"], rel=1e-4)


@pytest.mark.parametrize("kind_of_mean", ["median", "trimmed-mean", "krum"])
def test_one_client_with_a_wrong_upload_does_not_change_a_robust_run(tiny, kind_of_mean):
    def fault(attempt, partition, reply):
        if attempt and partition == 1:
            for array in reply.content[messages.ARRAYS].values():
                values = np.full(array.shape, 1e6, np.float32)
                array.data = tensors.to_record({"x": values})["x"].data
        return reply

    suspects = {} if kind_of_mean == "median" else {"suspects": 1}
    changes = {"robust": kind_of_mean, "min-clients": 5, "min-replies": 5} | suspects
    config = tiny(**open_run(5, method="la-lora-full") | changes | {"train.batch-size": 8})
    done = run(config, 5, fault=fault)
    assert all(np.abs(array).max() < 10 for array in done.folder.latest().adapter.values())
    plain = tiny(**open_run(5, method="la-lora-full") | {"min-clients": 5, "train.batch-size": 8})
    moved = run(replace(plain, output=plain.output + "-plain"), 5, fault=fault)
    assert any(np.abs(array).max() > 1e4 for array in moved.folder.latest().adapter.values())


def test_a_late_client_receives_the_whole_drift_of_the_base(tiny):
    """With fraction-train 0.5 of 4 clients, the clients of round 2 take no part in round 1."""
    changes = {"fraction-train": 0.5, "num-server-rounds": 4}
    config = tiny(**open_run(4, method="fedex-lora") | changes | {"train.batch-size": 8})
    grid = run(config, 4).grid
    for attempt in (1, 2, 3):
        drifts = [e.drift for e in grid.trained(attempt)]
        assert all((attempt > 1) == bool(drift) for drift in drifts)
        for drift in drifts:
            assert app_runs.same_bits(drift, drifts[0])
