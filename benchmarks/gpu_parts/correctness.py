"""Check the private step on the device: clipped sums, noise, resting factors, waiting for the GPU.

Clipped sums are compared with float64 gradients of single examples on the CPU (`reference.py`).
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from models import Batch
from one_step import PHASES
from torch import Tensor

from gpu_parts.reference import (
    EXAMPLES,
    MAKERS,
    Grads,
    KernelOnDevice,
    exact_gradients,
    joint_norm,
    local_settings,
    make_backbone,
    make_data,
    relative_error,
    small_model,
    stock_gradients,
    sum_of_clipped,
    take_steps,
)
from gpu_parts.settings import Row, Settings, Unit
from lalora_app.adapter.factors import active_names
from lalora_app.client.local_round import make_optimizer
from lalora_app.models.backbone import Backbone
from lalora_app.models.device import pick_device
from lalora_app.privacy.randomness import secure, seeded
from lalora_app.private_step.mechanism import add_noise

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STANDARD_ERRORS = 5  # a fair draw is further from its mean with probability 6e-7
Subject = dict[str, str]  # model, number type and kernel of a check


def _finding(check: str, ok: bool | None, **values: object) -> Row:
    """Return the row of a check; ``ok`` None: a value without a limit."""
    return {"check": check, "ok": ok, **values}


@cache
def _batch(model: str) -> Batch:
    torch.manual_seed(1)
    return small_model(model).make_batch(EXAMPLES, torch.device("cpu"))


def _batch_on(model: str, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in _batch(model).items()}


@cache
def _exact(model: str) -> list[Grads]:
    return exact_gradients(small_model(model), _batch(model))


@cache
def _stock(model: str, dtype: str, device: torch.device) -> list[Grads]:
    return stock_gradients(small_model(model), _batch_on(model, device), TYPES[dtype])


def check_sums(model: str, dtype: str, kernel: str, device: torch.device) -> Iterator[Row]:
    """Compare the clipped sums of one model with those of single examples in float64."""
    row, batch = small_model(model), _batch_on(model, device)
    placed = KernelOnDevice(row, kernel, batch, TYPES[dtype])
    subject = {"model": model, "dtype": dtype, "kernel": kernel}
    exact, stock = _exact(model), _stock(model, dtype, device)
    for phase in PHASES:
        yield _check_sum(placed, exact, stock, phase, subject)
    yield from _check_one_left_out(placed, exact, subject)


def _active(placed: KernelOnDevice, exact: list[Grads], phase: str) -> tuple[frozenset[str], float]:
    """Return a phase's active names, and the median norm of the exact gradients as C."""
    names = active_names(placed.engine.parameters, PHASES[phase])
    norms = torch.stack([joint_norm([grads[name] for name in names]) for grads in exact])
    return names, float(norms.median())


def _check_sum(
    placed: KernelOnDevice, exact: list[Grads], stock: list[Grads], phase: str, subject: Subject
) -> Row:
    names, clip_norm = _active(placed, exact, phase)
    expected = sum_of_clipped(exact, names, clip_norm)
    rounding = relative_error(sum_of_clipped(stock, names, clip_norm), expected)
    sums = placed.clipped_sum(names, clip_norm, list(range(EXAMPLES)))
    error = relative_error(sums, expected)
    limit = 1e-5 if placed.dtype == torch.float32 else max(2 * rounding, 1e-2)
    wide = all(value.dtype == torch.float32 for value in sums.values())
    values = {"phase": phase, "error": error, "stock_error": rounding, "limit": limit}
    return _finding("clipped sum", error <= limit and wide, **subject, **values)


def _check_one_left_out(
    placed: KernelOnDevice, exact: list[Grads], subject: Subject
) -> Iterator[Row]:
    names, clip_norm = _active(placed, exact, "both")
    everyone = list(range(EXAMPLES))
    sums, moved = placed.clipped_sum(names, clip_norm, everyone), []
    for i in everyone:
        fewer = placed.clipped_sum(names, clip_norm, [j for j in everyone if j != i])
        moved.append(float(joint_norm([sums[n] - fewer[n] for n in names])) / clip_norm)
    # bf16 may round the other examples' gradients differently in a smaller batch: no limit there
    ok = max(moved) <= 1 + 1e-5 if placed.dtype == torch.float32 else None
    yield _finding("one left out", ok, **subject, largest_change_over_clip_norm=max(moved))
    change = float((placed.losses()[1:] - placed.losses(first=1)).abs().max())
    yield _finding("loss with one fewer", None, **subject, largest_change=change)


def check_steps(
    model: str, dtype: str, kernel: str, optimizer: str, device: torch.device
) -> Iterator[Row]:
    """Take LA-LoRA's steps B, A, B, A: resting factors keep their bits, the host never waits."""
    backbone = make_backbone(model, small_model(model), kernel, device, TYPES[dtype])
    subject = {"model": model, "dtype": dtype, "kernel": kernel, "optimizer": optimizer}
    data = make_data(model)
    made = make_optimizer(backbone, local_settings(optimizer), 0.0, {})
    wrong = _wrongly_moved(backbone, partial(take_steps, backbone, data, made, 4))
    yield _finding("resting factor", not wrong, **subject, wrong=len(wrong))
    if device.type != "cuda":
        yield _finding("no wait", None, **subject, note="not applicable on a CPU")
        return
    where = _first_wait(partial(take_steps, backbone, data, made, 2))
    yield _finding("no wait", where is None, **subject, where=where)


def _wrongly_moved(
    backbone: Backbone, steps: Callable[[Callable[[frozenset[str]], None]], None]
) -> list[str]:
    """Return the tensors that moved in a step that rests them, rested in one that trains them.

    Tensors with a value that is not finite count too.
    """
    before = {n: p.detach().clone() for n, p in backbone.engine.parameters.items()}
    wrong: list[str] = []

    def compare(names: frozenset[str]) -> None:
        for n, parameter in backbone.engine.parameters.items():
            same = torch.equal(parameter.detach(), before[n])
            if same == (n in names) or not bool(parameter.isfinite().all()):
                wrong.append(n)
            before[n] = parameter.detach().clone()

    steps(compare)
    return wrong


def _first_wait(steps: Callable[[], None]) -> str | None:
    """Return the source line where the host first waits for the GPU; None: nowhere."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in frames[-3:]]
        return " < ".join([str(error).splitlines()[0][:80], *reversed(places)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _deviations(x: Tensor) -> dict[str, float]:
    """Return the deviations of a draw's moments from N(0, 1), in standard errors."""
    n, std = x.numel(), float(x.std())
    fourth = float((x - x.mean()).pow(4).mean()) / std**4
    neighbours = float((x[:-1] * x[1:]).mean()) / std**2
    beyond, share = float((x.abs() > 3).double().mean()), 0.0026997960632601866
    return {
        "z_mean": float(x.mean()) / std * n**0.5,
        "z_std": (std - 1) * (2 * n) ** 0.5,
        "z_kurtosis": (fourth - 3) * (n / 24) ** 0.5,
        "z_neighbours": neighbours * n**0.5,
        "z_beyond_3_sigma": (beyond - share) / (share * (1 - share) / n) ** 0.5,
    }


def check_noise(device: torch.device) -> Iterator[Row]:
    """Compare releases of noise alone with N(0, (z·C)²) / (q·n)."""
    shapes = {"a.lora_A.w": (8, 4096), "b.lora_B.w": (4096, 8), "head.w": (999, 1001)}
    zeros = {n: torch.zeros(s, device=device) for n, s in shapes.items()}

    def release(rng: np.random.Generator) -> Tensor:
        noised = add_noise(zeros, noise_std=0.6, expected_batch=20.0, rng=rng)
        return torch.cat([g.flatten() for g in noised.values()]).double() * 20.0 / 0.6

    stream = secure()
    first, second, other = release(stream), release(stream), release(secure())
    for which, draw in {"first": first, "second": second, "other stream": other}.items():
        found = _deviations(draw)
        right = all(abs(value) < STANDARD_ERRORS for value in found.values())
        values = {"entries": draw.numel(), "std_of_entries": float(draw.std())}
        yield _finding("noise", right, release=which, **values, **found)
    for pair, (a, b) in {"two releases": (first, second), "two streams": (first, other)}.items():
        z, equal = float((a * b).mean()) * first.numel() ** 0.5, int((a == b).sum())
        right = abs(z) < STANDARD_ERRORS and equal < 20
        yield _finding("noise, independent", right, pair=pair, z_correlation=z, equal_entries=equal)
    yield _finding("noise, seeded", torch.equal(release(seeded(1, "n")), release(seeded(1, "n"))))
    yield _finding("noise, sums kept", all(not bool(z.any()) for z in zeros.values()))


def units(settings: Settings) -> list[Unit]:
    """Return the checks: noise first, then sums and steps by model, number type and kernel."""
    warnings.simplefilter("ignore")
    device = pick_device(settings.device)
    kernels = ["fused"] if settings.quick else ["fused", "merged", "plain"]
    models = ["bert, padded", "swin"] if settings.quick else list(MAKERS)
    found = [Unit("noise", partial(check_noise, device))]
    for case in product(models, TYPES, kernels):
        found.append(Unit(f"sums, {', '.join(case)}", partial(check_sums, *case, device)))
        for optimizer in ("adamw", "sgd"):
            check = partial(check_steps, *case, optimizer, device)
            found.append(Unit(f"steps, {', '.join(case)}, {optimizer}", check))
    return found
