"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tune_study.folder import files
from tune_study.folder.files import write_folder_whole, write_whole


def test_writing_replaces_by_rename(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, lambda temporary: temporary.write_text("new") and None)
        assert reader.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("write", [write_whole, write_folder_whole])
def test_what_is_written_reaches_the_disk_before_its_name(write, tmp_path, monkeypatch) -> None:
    calls: list[int | str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        calls.append("rename")
        replace(old, new)

    def content(temporary: Path) -> None:
        (temporary / "inner" if temporary.is_dir() else temporary).write_text("new")

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    write(tmp_path / "name", content)
    written = tmp_path / "name"
    written = written / "inner" if written.is_dir() else written
    assert calls == [written.stat().st_ino, "rename", tmp_path.stat().st_ino]
