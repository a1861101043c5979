"""One client's round: private steps on the active factors, in the order of the schedule."""

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from lalora_app.adapter.closed_rows import with_closed_rows
from lalora_app.adapter.factors import Adapter, active_names, kind
from lalora_app.data.encoding import Encoded
from lalora_app.methods.learning_rates import learning_rates, rate_factor
from lalora_app.methods.method import Method
from lalora_app.methods.optimizers import OptimizerSettings
from lalora_app.models.backbone import Backbone
from lalora_app.models.frozen_weights import Change
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seed_of
from lalora_app.private_step.gradients import NoisedGrads
from lalora_app.private_step.step import RandomStreams, noise_std_of, private_gradient
from lalora_app.private_step.views import private_views
from lalora_app.settings.run_config import MethodNumbers, Train


@dataclass(frozen=True)
class LocalSettings:
    """Settings of a round's local steps.

    Attributes:
        method: the run's method.
        t: the round, from 1.
        rounds: the number of rounds of the whole run.
        train: the run config's table ``train``.
        rule: the run config's table ``rule``.
        clip_norm: C, the largest joint gradient norm of one example.
        seed: the seed of this client and round, for random draws that do not use the data.
        clipping: ``privacy.clipping``, the factor that bounds the norm.
        least_divisor: smallest divisor of a sum over a batch: the batch size in a run with tasks.
            A client with fewer examples of a task then draws all of them, and none counts more than
            an example of another client. 0: the expected batch divides.
        closed: (classes,), whether a class is of a task that is not open; empty: heads are not
            divided.
    """

    method: Method
    t: int
    rounds: int
    train: Train
    rule: MethodNumbers
    clip_norm: float
    seed: int = 0
    clipping: str = "flat"
    least_divisor: float = 0.0
    closed: tuple[bool, ...] = ()

    @property
    def _steps(self) -> int:
        return self.rounds * self.train.local_steps

    def _steps_before(self, k: int) -> int:
        return (self.t - 1) * self.train.local_steps + k

    def progress(self, k: int) -> float:
        """Return the share of the run's steps before step ``k``, from 0 to 1."""
        return self._steps_before(k) / self._steps

    def rate_factor(self, k: int) -> float:
        """Return the factor of all learning rates in step ``k``."""
        return rate_factor(self.train, self._steps_before(k), self._steps)


def make_optimizer(
    backbone: Backbone, local: LocalSettings, noise_std: float, start: Adapter
) -> torch.optim.Optimizer:
    """Return the round's optimiser: one group per kind of tensor, with the round's learning rate.

    A tensor without a gradient keeps its value and its moments bit for bit.

    Args:
        backbone: the model, whose tensors the optimiser changes.
        local: the settings of the local steps.
        noise_std: standard deviation of the noise in one entry of a noised mean gradient.
        start: the adapter at the start of the round.
    """
    groups = []
    for which, rate in learning_rates(local.train, local.rule, local.t).items():
        named = {n: p for n, p in backbone.engine.parameters.items() if kind(n) == which}
        tensors = {"params": list(named.values()), "names": list(named)}
        groups.append({"kind": which, "lr": rate, **tensors})
    settings = OptimizerSettings(local.train, local.rule, noise_std, start)
    return local.method.optimizer(groups, settings)


def apply(backbone: Backbone, optimizer: torch.optim.Optimizer, gradients: NoisedGrads) -> None:
    """Take one optimiser step on the tensors with a gradient, and on no other."""
    for name, parameter in backbone.engine.parameters.items():
        parameter.grad = gradients.get(name)
    optimizer.step()


def _perturbation(backbone: Backbone, local: LocalSettings, k: int) -> Change | None:
    """Return the method's perturbation of the frozen weights in step ``k``, or None.

    Privacy: it is drawn from a seed, without the data.
    """
    perturb, rule = local.method.perturb, local.rule
    if perturb is None:
        return None
    seed = seed_of(local.seed, "perturbation", k) % 2**63
    generator = torch.Generator(backbone.device).manual_seed(seed)
    return lambda weight: perturb(weight, local.progress(k), rule.flat_radius, generator)


def run_round(
    backbone: Backbone,
    data: Encoded,
    start: Adapter,
    drift: Adapter,
    *,
    local: LocalSettings,
    reservation: Reservation,
    streams: RandomStreams,
) -> Adapter:
    """Run a round's local steps and return the client's whole adapter.

    Privacy: every step is one release of the reservation; the result is computed from ``start``
    and noised gradients only, so all of it may leave the client.

    Args:
        backbone: the model; its adapter is overwritten.
        data: the client's encoded examples.
        start: the adapter at the start of the round.
        drift: the change of the frozen weights since the run began.
        local: the settings of the local steps.
        reservation: the round's releases, already on the ledger.
        streams: the random streams of sampling and noise.
    """
    method, train = local.method, local.train
    backbone.load(start, drift)
    expected = max(reservation.sampling_rate * len(data), local.least_divisor)
    noise_std = noise_std_of(reservation, local.clip_norm) / expected
    views = private_views(data, train.views, streams.sampling)
    optimizer = make_optimizer(backbone, local, noise_std, start)
    schedule = LambdaLR(optimizer, local.rate_factor)
    for k in range(train.local_steps):
        backbone.engine.activate(active_names(start, method.trains(local.t, k)))
        with backbone.frozen_weights.perturbed(_perturbation(backbone, local, k)):
            noised = private_gradient(
                backbone,
                views,
                reservation=reservation,
                expected_batch=expected,
                clip_norm=local.clip_norm,
                micro_batch=train.micro_batch,
                streams=streams,
                clipping=local.clipping,
            )
        tensors = backbone.engine.parameters
        grads = method.penalty(method.postprocess(noised), tensors, local.rule)
        apply(backbone, optimizer, grads)
        schedule.step()
    trained = with_closed_rows(start, backbone.adapter(), local.closed)
    return method.align(start, trained | method.report(optimizer))
