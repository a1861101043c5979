"""One audit of one seed: which attacks a mechanism is put through, and how large they are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lalora_app.audit import published_mechanism
from lalora_app.audit.broken_mechanisms import BROKEN
from lalora_app.audit.estimators import counted_p_value
from lalora_app.audit.findings import AuditReport, AuditRow
from lalora_app.audit.step_attack import (
    ATTACKS,
    Bound,
    CountedReleases,
    bounded,
    by_curve,
    counted_releases,
    observe,
    observe_single_canary,
    side_by_side,
)
from lalora_app.data.partition import partition
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.randomness import seed_of
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config

REAL = "lalora"
CONTROL = "gaussian"
PUBLISHED = "la-lora-published"
MECHANISMS = (REAL, CONTROL, PUBLISHED, *BROKEN)
_WIDTH, _RANK, _LAYERS = 384, 8, 12  # of the default run's factors of one kind
_SHAPES: dict[str, tuple[int, ...]] = {
    **{f"layer.{i}.lora_B.weight": (_WIDTH, _RANK) for i in range(_LAYERS)},
    "classifier.weight": (2, _WIDTH),
    "classifier.bias": (2,),
}
_BLANKS = 256  # directions that show the noise alone


@dataclass(frozen=True)
class Size:
    """How much is spent on an audit.

    Attributes:
        canaries: of a run of the step audit.
        runs: of it, side by side.
        alone: runs whose only record is the canary.
        planted: mislabelled examples of the end-to-end audit; 0: it is left out.
        trials: of the published mechanism.
    """

    canaries: int
    runs: int
    alone: int
    planted: int
    trials: int


FULL = Size(canaries=24_320, runs=4, alone=400, planted=400, trials=200_000)
FAST = Size(canaries=12_160, runs=1, alone=100, planted=0, trials=20_000)


@dataclass(frozen=True)
class Request:
    """What is asked of an audit.

    Attributes:
        config: of the run; its ε and δ are the promise.
        mechanism: one of MECHANISMS.
        clients: of the simulated deal; the first is attacked.
        confidence: of the whole report.
        size: FULL or FAST.

    Raises:
        ConfigError: for an unknown mechanism, or ε = inf.
    """

    config: Config
    mechanism: str
    clients: int
    confidence: float
    size: Size

    def __post_init__(self) -> None:
        """Check what no attack could use."""
        if self.mechanism not in MECHANISMS:
            raise ConfigError(
                f'mechanism="{self.mechanism}" must be one of ' + ", ".join(MECHANISMS)
            )
        if math.isinf(self.config.privacy.epsilon):
            raise ConfigError("epsilon=inf must be finite: an audit tests a promise")


Say = Callable[[str], None]


def plan_of(request: Request) -> CountedReleases:
    """Return the releases that the client's ledger counts; the control is one full batch."""
    privacy, train = request.config.privacy, request.config.train
    limit = Limit(privacy.epsilon, privacy.delta)
    if request.mechanism == CONTROL:
        return counted_releases(limit, rate=1.0, rounds=1, steps=1, clip_norm=privacy.clip_norm)
    data = partition(request.config.data, request.config.seed, request.clients)[0]
    return counted_releases(
        limit,
        rate=train.batch_size / len(data),
        rounds=request.config.num_server_rounds,
        steps=train.local_steps,
        clip_norm=privacy.clip_norm,
    )


def _row(name: str, bound: Bound, plan: CountedReleases, curve: float | None = None) -> AuditRow:
    guesses = bound.guesses
    said = f"{guesses.correct} of {guesses.made} guesses right by {bound.attack}"
    p_value = counted_p_value(bound.errors, [plan.release])
    return AuditRow(name, bound.epsilon, curve, said, p_value, bound.roc)


def _many_canaries(
    request: Request, plan: CountedReleases, seed: int, confidence: float
) -> AuditRow:
    """Attack whole runs in which half of many canaries are."""
    size, broken = request.size, BROKEN.get(request.mechanism)
    runs = 1 if broken else size.runs  # a broken step may know the order of one run's records
    seen = [
        observe(
            plan,
            _SHAPES,
            size.canaries,
            seed_of(seed, "audit run", i),
            blanks=_BLANKS,
            **({"step": broken.make()} if broken else {}),
        )
        for i in range(runs)
    ]
    attacks = {**ATTACKS, **(broken.attacks if broken else {})}
    bound = bounded(side_by_side(seen), plan, confidence, attacks)
    return _row("step", bound, plan, None if broken else by_curve(bound, plan, confidence))


def _single_canary(
    request: Request, plan: CountedReleases, seed: int, confidence: float
) -> AuditRow:
    """Attack runs in which the canary is the only record."""
    broken = BROKEN.get(request.mechanism)
    more = {"step": broken.make()} if broken else {}
    seen = observe_single_canary(plan, request.size.alone, seed, **more)
    return _row("step, alone", bounded(seen, plan, confidence), plan)


def _end_to_end(
    request: Request, seed: int, confidence: float
) -> tuple[AuditRow, dict[str, object]]:
    """Attack a whole federation; imports the models only where it is asked for."""
    from lalora_app.audit.run_attack import audit_run

    bound = audit_run(
        request.config,
        canaries=request.size.planted,
        clients=request.clients,
        seed=seed,
        confidence=confidence,
    )
    guesses = bound.guesses
    said = f"{guesses.correct} of {guesses.made} guesses right, AUC {bound.aucs['sent']:.3f}"
    by_round = [[p.t, p.kind, p.sent, p.spread, p.auc, p.auc_drawn] for p in bound.parts]
    facts: dict[str, object] = {"auc": bound.aucs, "by_round": by_round}
    return AuditRow("run", bound.epsilon, None, said, roc=bound.roc), facts


def _published(request: Request, seed: int) -> AuditReport:
    """Attack one step of the published mechanism, with a typical and with a loud example."""
    privacy, trials = request.config.privacy, request.size.trials
    confidence = (1 + request.confidence) / 2
    rows = []
    for name, loudness in (("one step, typical example", 1.0), ("one step, loud example", 100.0)):
        setting = replace(published_mechanism.Setting(), loudness=loudness)
        seen = published_mechanism.attacked(setting, trials, seed)
        said = f"{seen.errors.false_alarms + seen.errors.misses} errors in {2 * trials} trials"
        said += f", {seen.distance:.0f} deviations of the noise apart"
        rows.append(AuditRow(name, seen.bound(privacy.delta, confidence), None, said))
    return AuditReport(PUBLISHED, privacy.epsilon, request.confidence, privacy.delta, seed, rows)


def run_audit(request: Request, seed: int, say: Say) -> AuditReport:
    """Run all attacks that the mechanism is put through, with progress lines to ``say``.

    The real mechanism's rows share the confidence, so that all of them hold at once. In a broken
    one the row is one.
    """
    if request.mechanism == PUBLISHED:
        return _published(request, seed)
    plan, broken = plan_of(request), BROKEN.get(request.mechanism)
    release = plan.release
    say(
        f"{release.count} releases at q {release.sampling_rate:.4f} with noise multiplier "
        f"{release.noise_multiplier:.3f}: epsilon {plan.epsilon:.3f} by the ledger"
    )
    real = request.mechanism == REAL
    whole = real and request.size.planted > 0
    each = 1 - (1 - request.confidence) / (1 + real + whole)
    rows: list[AuditRow] = []
    facts: dict[str, object] = {}
    if not (broken and broken.single_canary):
        rows.append(_many_canaries(request, plan, seed, each))
        say(f"step: at least {rows[-1].epsilon:.2f}")
    if real or (broken and broken.single_canary):
        rows.append(_single_canary(request, plan, seed, each))
        say(f"step, alone: at least {rows[-1].epsilon:.2f}")
    if whole:
        row, facts = _end_to_end(request, seed, each)
        rows.append(row)
    return AuditReport(
        request.mechanism, plan.epsilon, request.confidence, plan.delta, seed, rows, facts
    )
