"""Write an audit into its run's folder: audit.json, report.html and the model card."""

from pathlib import Path

from lalora_app.audit.findings import AuditReport
from lalora_app.results.finished_run import read_record
from lalora_app.results.model_card import CARD_ROW
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run, before any attack.

    Raises:
        ConfigError: if it does not.
    """
    read_record(folder)
    if not _card(folder).is_file():
        raise ConfigError(f"run={folder} must have a model card, {_card(folder)}")


def _card(folder: Path) -> Path:
    return RunFolder(folder).adapter / "README.md"


def add_to_run(found: AuditReport, folder: Path) -> None:
    """Write audit.json, and both ε into the run's report and model card.

    Args:
        found: the audit of the run's own config.
        folder: the folder of a finished run; an earlier audit in it is replaced.
    """
    from lalora_app.reports.page import write_report

    RunFolder(folder).write_json("audit.json", found.fields())
    write_report([read_record(folder)], folder / "report.html", folder.resolve().name)
    lines = _card(folder).read_text("utf-8").splitlines()
    updated = [found.card_row() if line.startswith(CARD_ROW) else line for line in lines]
    _card(folder).write_text("\n".join(updated) + "\n", "utf-8")
