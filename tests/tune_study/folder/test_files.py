"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from tune_study.folder.files import write_whole


def test_writing_replaces_by_rename(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, lambda temporary: temporary.write_text("new") and None)
        assert reader.read() == "old"
    assert path.read_text() == "new"
