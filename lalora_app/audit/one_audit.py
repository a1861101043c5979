"""One audit with one seed: the attacks on a mechanism, their numbers of trials, the report."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from lalora_app.audit import published_mechanism
from lalora_app.audit.broken_mechanisms import BROKEN
from lalora_app.audit.broken_shares import BROKEN_SHARING
from lalora_app.audit.estimators import counted_p_value
from lalora_app.audit.findings import AuditReport, AuditRow
from lalora_app.audit.shared_step import (
    check_own_noise,
    shared_releases,
    shared_views,
)
from lalora_app.audit.step_attack import (
    ATTACKS,
    Bound,
    Observed,
    Step,
    bounded,
    by_curve,
    observe,
    observe_single_canary,
    real_step,
    side_by_side,
)
from lalora_app.data.partition import clients_data
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.counted_releases import CountedReleases, counted_releases
from lalora_app.privacy.randomness import seed_of
from lalora_app.server.cohorts import planned_cohorts
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import CLASS_MEANS
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.shares import Cohort

REAL = "lalora"
CONTROL = "gaussian"
PUBLISHED = "la-lora-published"
MECHANISMS = (REAL, CONTROL, PUBLISHED, *BROKEN, *BROKEN_SHARING)
_WIDTH, _RANK, _LAYERS = 384, 8, 12  # sizes of the default run's B factors
_SHAPES: dict[str, tuple[int, ...]] = {
    **{f"layer.{i}.lora_B.weight": (_WIDTH, _RANK) for i in range(_LAYERS)},
    "classifier.weight": (2, _WIDTH),
    "classifier.bias": (2,),
}
_SHARED_SHAPES = {f"layer.{i}.lora_B.weight": (64, _RANK) for i in range(_LAYERS)}
_SHARED_CANARIES = 3840  # of a broken form of shared noise: 4,096 directions less the blanks
_BLANKS = 256  # number of directions without a canary, for the measurement of the noise


@dataclass(frozen=True)
class AuditSize:
    """The number of trials of each attack.

    Attributes:
        canaries: canaries per run of the step audit.
        runs: runs of the step audit, side by side.
        single_canary_runs: runs with the canary as the only record.
        mislabelled: canaries of the end-to-end audit; 0 leaves it out.
        published_steps: steps of the published mechanism per attack, with the example and without.
    """

    canaries: int
    runs: int
    single_canary_runs: int
    mislabelled: int
    published_steps: int


FULL = AuditSize(
    canaries=24_320, runs=4, single_canary_runs=400, mislabelled=400, published_steps=200_000
)
FAST = AuditSize(
    canaries=12_160, runs=1, single_canary_runs=100, mislabelled=0, published_steps=20_000
)


@dataclass(frozen=True)
class AuditRequest:
    """The settings of an audit.

    Attributes:
        config: the run's config; its ε and δ are the promise to test.
        mechanism: one of MECHANISMS.
        clients: number of simulated clients; the first one is attacked.
        confidence: confidence of the whole report.
        size: FULL or FAST.

    Raises:
        ConfigError: for an unknown mechanism, ε = inf, class means or tasks, which no attack
            covers, or a whole run with shared noise.
    """

    config: Config
    mechanism: str
    clients: int
    confidence: float
    size: AuditSize

    def __post_init__(self) -> None:
        """Check the mechanism, the promise and the releases."""
        if self.mechanism not in MECHANISMS:
            raise ConfigError(
                f'mechanism="{self.mechanism}" must be one of ' + ", ".join(MECHANISMS)
            )
        if math.isinf(self.config.privacy.epsilon):
            raise ConfigError("epsilon=inf must be finite: an audit tests a promise")
        if self.config.model.head == CLASS_MEANS:
            raise ConfigError(
                f'model.head="{CLASS_MEANS}" must be another one for an audit, whose attacks know '
                "local steps only"
            )
        if self.config.has_tasks:
            raise ConfigError(
                f"data.tasks={self.config.data.tasks} must be 1 for an audit, whose attacks know "
                "one task only"
            )
        if self.mechanism == REAL and self.size.mislabelled:
            check_own_noise(self.config)

    @property
    def shared(self) -> bool:
        """Whether the sums of a round are attacked, and not single uploads."""
        return self.mechanism == REAL and self.config.privacy.shared


LogLine = Callable[[str], None]


def victim_releases(request: AuditRequest) -> CountedReleases:
    """Return the attacked client's releases in the ledger.

    The control and a broken form of shared noise have one round of full batches.
    """
    privacy, train = request.config.privacy, request.config.train
    limit = Limit(privacy.epsilon, privacy.delta)
    clip_norm, clipping = privacy.clip_norm, privacy.clipping
    counted = partial(counted_releases, limit, clip_norm=clip_norm, clipping=clipping)
    if request.mechanism == CONTROL:
        return counted(rate=1.0, rounds=1, steps=1)
    if request.mechanism in BROKEN_SHARING:
        return counted(rate=1.0, rounds=1, steps=BROKEN_SHARING[request.mechanism].steps)
    if request.shared:
        return shared_releases(request.config)
    data = clients_data(request.config, request.clients)[0]
    cohorts = planned_cohorts(request.config, request.clients)
    return counted(
        rate=train.rate(len(data)),
        rounds=sum(0 in cohort for cohort in cohorts),
        steps=train.local_steps,
    )


def _row(name: str, bound: Bound, plan: CountedReleases, curve: float | None = None) -> AuditRow:
    guesses = bound.guesses
    evidence = f"{guesses.correct} of {guesses.made} guesses right by {bound.attack}"
    p_value = counted_p_value(bound.errors, [plan.release])
    return AuditRow(name, bound.epsilon, curve, evidence, p_value, bound.roc)


def _observed(
    request: AuditRequest, plan: CountedReleases, seed: int, step: Step, runs: int
) -> Observed:
    """Observe ``runs`` whole runs on many canaries, half of them in the data."""
    seeds = [seed_of(seed, "audit run", i) for i in range(runs)]
    count = request.size.canaries
    seen = [observe(plan, _SHAPES, count, own, blanks=_BLANKS, step=step) for own in seeds]
    return side_by_side(seen)


def _many_canaries(
    request: AuditRequest, plan: CountedReleases, seed: int, confidence: float
) -> AuditRow:
    """Attack whole runs on many canaries."""
    broken = BROKEN.get(request.mechanism)
    if broken is None:
        bound = bounded(
            _observed(request, plan, seed, real_step, request.size.runs), plan, confidence
        )
        return _row("step", bound, plan, by_curve(bound, plan, confidence))
    # One run: the attack on a fixed order needs the canaries of one.
    seen = _observed(request, plan, seed, broken.make(), runs=1)
    return _row("step", bounded(seen, plan, confidence, {**ATTACKS, **broken.attacks}), plan)


def _single_canary(
    request: AuditRequest, plan: CountedReleases, seed: int, confidence: float
) -> AuditRow:
    """Attack runs with the canary as the only record."""
    broken = BROKEN.get(request.mechanism)
    step = broken.make() if broken else real_step
    seen = observe_single_canary(plan, request.size.single_canary_runs, seed, step=step)
    return _row("step, alone", bounded(seen, plan, confidence), plan)


def _shared_rows(request: AuditRequest, plan: CountedReleases, seed: int) -> Iterator[AuditRow]:
    """Attack a client's rounds as another client sees them, and its uploads if they are opened."""
    views = shared_views(plan, Cohort.of(request.clients, request.config.privacy.colluding))
    confidence = 1 - (1 - request.confidence) / len(views)
    for name, (step, counted) in views.items():
        bound = bounded(
            _observed(request, plan, seed, step, request.size.runs), counted, confidence
        )
        row = _row(name, bound, counted, by_curve(bound, counted, confidence))
        yield row if counted is plan else replace(row, promise=counted.epsilon)


def _broken_sharing(request: AuditRequest, plan: CountedReleases, seed: int) -> AuditRow:
    """Attack one round of a broken form of shared noise."""
    step = BROKEN_SHARING[request.mechanism].make(plan)
    seen = observe(plan, _SHARED_SHAPES, _SHARED_CANARIES, seed, blanks=_BLANKS, step=step, views=1)
    return _row("sum", bounded(seen, plan, request.confidence), plan)


def _end_to_end(
    request: AuditRequest, seed: int, confidence: float
) -> tuple[AuditRow, dict[str, object]]:
    """Attack a whole federation."""
    from lalora_app.audit.run_attack import audit_run  # imports the models, seconds

    bound = audit_run(
        request.config,
        canaries=request.size.mislabelled,
        clients=request.clients,
        seed=seed,
        confidence=confidence,
    )
    guesses = bound.guesses
    evidence = f"{guesses.correct} of {guesses.made} guesses right, AUC {bound.aucs['sent']:.3f}"
    by_round = [[p.t, p.kind, p.sent, p.spread, p.auc, p.auc_drawn] for p in bound.parts]
    facts: dict[str, object] = {"auc": bound.aucs, "by_round": by_round}
    return AuditRow("run", bound.epsilon, None, evidence, roc=bound.roc), facts


def _published(request: AuditRequest, seed: int) -> AuditReport:
    """Attack one step of the published mechanism, with a typical and with a large gradient."""
    privacy, steps = request.config.privacy, request.size.published_steps
    rows = published_mechanism.rows(steps, seed, privacy.delta, (1 + request.confidence) / 2)
    return AuditReport(PUBLISHED, privacy.epsilon, request.confidence, privacy.delta, seed, rows)


def _rows(
    request: AuditRequest, plan: CountedReleases, seed: int, facts: dict[str, object]
) -> Iterator[AuditRow]:
    """Yield the outcome of each attack; an attack on a whole run adds its numbers to ``facts``."""
    if request.mechanism in BROKEN_SHARING:
        yield _broken_sharing(request, plan, seed)
        return
    if request.shared:
        yield from _shared_rows(request, plan, seed)
        return
    broken, real = BROKEN.get(request.mechanism), request.mechanism == REAL
    whole = real and request.size.mislabelled > 0
    each = 1 - (1 - request.confidence) / (1 + real + whole)
    if not (broken and broken.single_canary):
        yield _many_canaries(request, plan, seed, each)
    if real or (broken and broken.single_canary):
        yield _single_canary(request, plan, seed, each)
    if whole:
        row, found = _end_to_end(request, seed, each)
        facts.update(found)
        yield row


def run_audit(request: AuditRequest, seed: int, log: LogLine) -> AuditReport:
    """Run all attacks on the request's mechanism.

    Several attacks share the error probability 1 - confidence equally, so that all bounds hold
    together. A broken mechanism gets one attack with the whole error probability.

    Args:
        request: the settings.
        seed: seed of the canaries' membership, of batches and of noise.
        log: function that is called with each line about the progress.
    """
    if request.mechanism == PUBLISHED:
        return _published(request, seed)
    plan = victim_releases(request)
    release, known = plan.release, BROKEN | BROKEN_SHARING
    if request.mechanism in known:
        log(f"mechanism {request.mechanism}: {known[request.mechanism].defect}")
    log(
        f"{release.count} releases at q {release.sampling_rate:.4f} with noise multiplier "
        f"{release.noise_multiplier:.3f}: epsilon {plan.epsilon:.3f} by the ledger"
    )
    rows: list[AuditRow] = []
    facts: dict[str, object] = {}
    for row in _rows(request, plan, seed, facts):
        rows.append(row)
        log(f"{row.name}: at least {row.epsilon:.2f}")
    return AuditReport(
        request.mechanism, plan.epsilon, request.confidence, plan.delta, seed, rows, facts
    )
