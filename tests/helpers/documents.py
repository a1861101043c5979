"""The project's documents as a reader sees them: texts, code blocks, commands."""

import re
import shlex
from pathlib import Path

from conftest import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(path: Path) -> list[str]:
    """The shell blocks of a document: fenced without a language, or marked as sh."""
    text = path.read_text("utf-8")
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S)
    return [body for language, body in found if language in ("", "sh")]


def lines(path: Path) -> list[str]:
    """The lines of all shell blocks, continued lines joined."""
    joined = "\n".join(blocks(path)).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def inline(path: Path) -> list[str]:
    """The inline code of a document's prose."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", prose)


def commands(path: Path, *programs: str) -> list[list[str]]:
    """Every command of a document that starts one of the programs, as its arguments."""
    found = []
    for line in [*lines(path), *inline(path)]:
        for part in re.split(r"\s&&\s", line):
            start = re.match(r"(?:\w+=\S+ )*(" + "|".join(programs) + r")(?:\s|$)", part)
            if start and "…" not in part:
                found.append(shlex.split(part[start.start(1) :], comments=True))
    return found
