"""The hash of the code is one of the whole package, and not of the folder of the function."""

import shutil

import pytest

from conftest import ROOT
from lalora_app.wire import code_version

PACKAGE = ROOT / "lalora_app"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def hash_of(package, monkeypatch) -> str:
    """The hash that code_version computes where it lies in ``package``."""
    monkeypatch.setattr(code_version, "__file__", str(package / "wire" / "code_version.py"))
    return code_version.code_hash.__wrapped__()


@pytest.fixture
def copied(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(PACKAGE, tmp_path / "lalora_app", ignore=ignored)


def test_an_unchanged_copy_has_the_hash_of_the_package(copied, monkeypatch):
    own = code_version.code_hash()
    assert hash_of(copied, monkeypatch) == own


def test_a_change_in_any_folder_or_at_the_top_changes_the_hash(copied, monkeypatch):
    assert "wire" in FOLDERS
    assert len(FOLDERS) > 10
    seen = [hash_of(copied, monkeypatch)]
    for file in (*(f"{folder}/__init__.py" for folder in FOLDERS), "client_app.py"):
        path = copied / file
        path.write_text(path.read_text("utf-8") + "\n# changed\n", "utf-8")
        seen.append(hash_of(copied, monkeypatch))
    assert len(set(seen)) == len(FOLDERS) + 2


def test_a_moved_file_changes_the_hash(copied, monkeypatch):
    before = hash_of(copied, monkeypatch)
    (copied / "wire" / "refusals.py").rename(copied / "wire" / "other.py")
    assert hash_of(copied, monkeypatch) != before
