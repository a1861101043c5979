"""An audit told where the run is: audit.json, report.html and the model card of its folder."""

from pathlib import Path

from lalora_app.audit.findings import AuditReport
from lalora_app.results.finished_run import read_record
from lalora_app.results.model_card import CARD_ROW
from lalora_app.results.run_folder import RunFolder
from lalora_app.settings.errors import ConfigError


def check_finished(folder: Path) -> None:
    """Check that there is a finished run to tell of, before anything is attacked.

    Raises:
        ConfigError: if there is none.
    """
    read_record(folder)
    if not _card(folder).is_file():
        raise ConfigError(f"run={folder} must have a model card, {_card(folder)}")


def _card(folder: Path) -> Path:
    return RunFolder(folder).adapter / "README.md"


def add_to_run(found: AuditReport, folder: Path) -> None:
    """Write audit.json, and tell both ε in the run's report and model card.

    Args:
        found: of the run's own config.
        folder: of a finished run; an audit that it had before is replaced.
    """
    from lalora_app.reports.page import write_report

    RunFolder(folder).write_json("audit.json", found.fields())
    write_report([read_record(folder)], folder / "report.html", folder.resolve().name)
    lines = _card(folder).read_text("utf-8").splitlines()
    told = [found.card_row() if line.startswith(CARD_ROW) else line for line in lines]
    _card(folder).write_text("\n".join(told) + "\n", "utf-8")
