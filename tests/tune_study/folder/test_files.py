"""Files are written whole or not at all."""

from __future__ import annotations

import math
import os
import re
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


def test_a_folder_takes_the_place_of_another_and_of_what_a_kill_left(tmp_path: Path) -> None:
    path, left = tmp_path / "deep" / "name", tmp_path / "deep" / ".name.tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("of a writer that was killed")
    for text in ("first", "second"):
        write_folder_whole(path, lambda folder, text=text: (folder / text).write_text(text))
        assert [file.name for file in path.iterdir()] == [text]
        assert [file.name for file in path.parent.iterdir()] == ["name"]


def test_a_folder_that_cannot_be_filled_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "name"
    write_folder_whole(path, lambda folder: (folder / "file").write_text("whole"))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_whole(path, fail)
    assert [file.name for file in tmp_path.rglob("*")] == ["name", "file"]


def test_json_as_it_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {1: [math.nan, (2.5, True)], "é": -math.inf})
    assert path.read_text(encoding="utf-8") == (
        '{\n "1": [\n  null,\n  [\n   2.5,\n   true\n  ]\n ],\n "\\u00e9": null\n}\n'
    )
    assert files.read_json(path) == {"1": [None, [2.5, True]], "é": None}
    assert files.read_json(tmp_path) is None  # a folder
    path.write_bytes(b"\xff")
    assert files.read_json(path) is None


def test_a_path_through_what_is_no_mapping_is_empty() -> None:
    value = {"a": {"b": {"c": 1}, "n": 3}}
    assert files.mapping(value, "a", "b") == {"c": 1}
    assert files.mapping(value) is value
    for keys in (("x",), ("a", "n"), ("a", "n", "m"), ("x", "y")):
        assert files.mapping(value, *keys) == {}
    assert files.mapping([1]) == {}


def test_bytes_their_digest_and_the_time(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "file", b"abc")
    assert (tmp_path / "file").read_bytes() == b"abc"
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.file_sha256(tmp_path / "file") == expected  # FIPS 180-2's example
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", files.now())


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    def nothing(temporary: Path) -> None:
        raise OSError("disk full")

    for fail in (half, nothing):
        with pytest.raises(OSError, match="disk full"):
            write_whole(path, fail)
    assert files.read_json(path) == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "none.json") is None


def test_folders_above_are_made_and_none_is_left_open(tmp_path: Path, monkeypatch) -> None:
    descriptors, opened = [], os.open

    def noted(*given: object) -> int:
        descriptors.append(opened(*given))  # type: ignore[arg-type]
        return descriptors[-1]

    monkeypatch.setattr(files.os, "open", noted)
    write_folder_whole(tmp_path / "deep" / "er", lambda folder: None)
    assert descriptors
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
