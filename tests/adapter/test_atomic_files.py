"""Files that are replaced atomically, on file systems with and without durable folders."""

import errno
import os
import stat

import pytest

from lalora_app.adapter.atomic_files import replace_atomically


def failing_for_folders(monkeypatch, code):
    honest = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_takes_files(code, tmp_path, monkeypatch):
    failing_for_folders(monkeypatch, code)
    with replace_atomically(tmp_path / "new" / "file") as new:
        new.write_text("content", "utf-8")
    assert (tmp_path / "new" / "file").read_text("utf-8") == "content"


def test_a_failing_disk_is_reported(tmp_path, monkeypatch):
    failing_for_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="error"), replace_atomically(tmp_path / "file") as new:
        new.write_text("content", "utf-8")
