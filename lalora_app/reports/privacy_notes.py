"""Sentences of the report page on what is private, for whom, and what an audit found."""

from collections.abc import Sequence

from lalora_app.privacy.two_epsilons import sentences
from lalora_app.reports.table_formats import joined
from lalora_app.results.finished_run import Record


def audit_notes(records: Sequence[Record]) -> list[str]:
    """Return one sentence per audited run, with the attack's and the ledger's ε."""
    return [
        f"Audit of {r.label} at ε = {r.epsilon:g}, seed {r.seed}: the attack proves an ε of at "
        f"least {r.audit['epsilon_lower']:.2f} at {r.audit['confidence']:.0%} confidence; the "
        f"ledger counts at most {r.audit['epsilon_upper']:.2f} at δ = {r.audit['delta']:g}. "
        + ("This mechanism is BROKEN." if r.audit["broken"] else "The two are consistent.")
        for r in records
        if r.audit is not None
    ]


def privacy_notes(records: Sequence[Record]) -> list[str]:
    """Return the guarantees of the private runs; nothing if no run is private."""
    private = [record for record in records if record.private]
    if not private:
        return []
    epsilons = joined(f"{r.epsilon:g}" for r in sorted(private, key=lambda r: r.epsilon))
    deltas = joined(f"{record.summary['delta']:g}" for record in private)
    units = joined(record.privacy["unit"] for record in private)
    accountants = joined(record.privacy["accountant"] for record in private)
    promise = (
        f"Privacy: each client has (ε, δ)-differential privacy with ε = {epsilons} and "
        f"δ = {deltas}, over all rounds of a run. Unit: {units}. Accounting: {accountants}."
    )
    told = [promise, *_two_epsilons(private)]
    if len(private) == 1:
        return told
    return [
        *told,
        "This holds for each run alone. For several runs on the same data, see lalora ledger show.",
    ]


def _two_epsilons(private: Sequence[Record]) -> list[str]:
    """Return who must be honest for which ε; nothing if no run shares noise."""
    shared = [r for r in private if r.summary.get("epsilon_alone") is not None]
    if not shared:
        return []
    labels, most = joined(r.label for r in shared), max(r.summary["epsilon_alone"] for r in shared)
    of_sums, alone = sentences("The ε above", f"A second ε, at most {most:.2f},")
    return [f"In {labels} the clients shared the noise of each sum. {of_sums} {alone}"]
