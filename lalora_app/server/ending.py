"""Write the results of a finished run: adapter, privacy report, summary, HTML report."""

import logging
from typing import Any

from lalora_app.models.scores import format_scores, scores_in_row
from lalora_app.results.model_card import accountant_of, not_covered, unit_of
from lalora_app.results.peft_export import export
from lalora_app.results.run_folder import RunFolder
from lalora_app.server.after_round import AfterRound
from lalora_app.server.log_lines import result_text
from lalora_app.server_state.task_accuracy import KEY, task_summary
from lalora_app.settings.errors import first_line
from lalora_app.settings.names import CLASS_MEANS
from lalora_app.settings.run_config import Config, Privacy

_log = logging.getLogger("flwr")


def _mean_bytes(rows: list[dict[str, Any]], key: str) -> float:
    used = [row[key] for row in rows if row["aggregated"]]
    mean = sum(used) / len(used)
    return int(mean) if mean == int(mean) else mean


def _alone(last: dict[str, Any]) -> dict[str, float]:
    """Return the largest ε of one client's uploads alone; nothing without shared noise."""
    alone = last.get("epsilon_alone")
    return {} if alone is None else {"epsilon_alone": alone}


def _summary(config: Config, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    last = rows[-1]
    failed = sum(not row["aggregated"] for row in rows)
    return {
        "method": config.method,
        "rounds": sum(row["aggregated"] for row in rows),
        **scores_in_row(last),
        **task_summary(rows, config.data.tasks),
        "epsilon_max": last["epsilon_max"],
        **_alone(last),
        "delta": config.privacy.delta,
        "upload_bytes_per_round": _mean_bytes(rows, "upload_bytes"),
        "download_bytes_per_round": _mean_bytes(rows, "download_bytes"),
        "seconds": round(seconds, 1),
        "status": "completed" if failed == 0 else f"completed, {failed} rounds failed",
    }


def _mechanism(privacy: Privacy) -> str:
    scaled = {"flat": "clipped to", "automatic": "scaled by automatic clipping to norms below"}
    return f"Gaussian, on sums of gradients {scaled[privacy.clipping]} {privacy.clip_norm}"


def _class_sums(config: Config) -> dict[str, Any]:
    """Return the entry on the release before the steps; none without it."""
    if config.model.head != CLASS_MEANS:
        return {}
    share = f"{config.privacy.head_share:g} of epsilon by itself"
    text = f"Gaussian, on class sums of features of length 1, once, all examples; {share}"
    return {"class_sums": text}


def _composition(config: Config) -> str:
    """Return which releases the ε of a run counts."""
    of_tasks = ", of each task by itself, since an example is in one task" * config.has_tasks
    return f"all rounds of this run{of_tasks}; other runs on the same data: lalora ledger show"


def _privacy_report(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "private": config.privacy.private,
        "epsilon_max": rows[-1]["epsilon_max"],
        **_alone(rows[-1]),
        "epsilon_promised": config.privacy.epsilon,
        "delta": config.privacy.delta,
        "unit": unit_of(config),
        "sampling": "Poisson, at each client's own rate: expected batch size over its examples",
        "mechanism": _mechanism(config.privacy),
        **_class_sums(config),
        "accountant": accountant_of(config),
        "noise": config.privacy.noise,
        "secure_aggregation": config.secure_aggregation,
        "participation": "balanced; no amplification by client sampling is claimed",
        "composition": _composition(config),
        "not_covered": not_covered(config),
    }


def _write_report(folder: RunFolder) -> None:
    """Write report.html; an error here is logged only, for the run's results are already saved."""
    # Seconds to import matplotlib: only at the end of a run.
    from lalora_app.reports.page import write_report
    from lalora_app.results.finished_run import read_record

    try:
        write_report([read_record(folder.path)], folder.path / "report.html", folder.name)
    except Exception as error:
        said = first_line(error)
        _log.error(
            "LaLoRA report.html is missing, all other results are saved: %s", said, exc_info=True
        )


def finish(after_round: AfterRound) -> None:
    """Write adapter, privacy report, summary and HTML report, then log the results.

    Raises:
        RuntimeError: if no round was aggregated.
    """
    config, folder, rows = after_round.config, after_round.folder, after_round.rows
    if not any(row["aggregated"] for row in rows):
        reasons = sorted({reason for row in rows for reason in row["dropped"]})
        raise RuntimeError(f"no round was aggregated: {'; '.join(reasons)}")
    summary = _summary(config, rows, after_round.elapsed())
    export(after_round.model, after_round.strategy.state, folder.adapter, config, rows[-1])
    folder.write_json("privacy.json", _privacy_report(config, rows))
    folder.write_json("summary.json", summary)
    _write_report(folder)
    for label, value in _results(folder, summary, private=config.privacy.private).items():
        _log.info("LaLoRA %s", result_text(label, value))


def _by_task(summary: dict[str, Any]) -> dict[str, str]:
    """Return the line on the tasks of a run; nothing without tasks."""
    numbers = ("average_accuracy", "forgetting", "backward_transfer")
    if KEY in summary and numbers[0] not in summary:
        return {"tasks": "the run ended before the last task: too many rounds failed"}
    if KEY not in summary:
        return {}
    return {"tasks": "  ".join(f"{name.replace('_', ' ')} {summary[name]:.4f}" for name in numbers)}


def _results(folder: RunFolder, summary: dict[str, Any], *, private: bool) -> dict[str, str]:
    """Return the last lines of a run's log: label -> text."""
    up, down = (summary[f"{way}_bytes_per_round"] for way in ("upload", "download"))
    warning = "" if private else "  (NOT private, see privacy.json)"
    alone = f", {summary['epsilon_alone']:.2f} alone" if "epsilon_alone" in summary else ""
    return {
        "folder": str(folder.path),
        "quality": format_scores(scores_in_row(summary)),
        **_by_task(summary),
        "privacy": f"largest client epsilon {summary['epsilon_max']:.2f} "
        f"at delta {summary['delta']:g}{alone}{warning}",
        "bytes": f"{up:,.0f} up, {down:,.0f} down, per client and round",
    }
