"""The file of decoded images: made once, whole or not there, and whatever lies there, no lie."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.tune_study.data.pictures import HOW, class_folders
from tune_study.data import cache, decoding
from tune_study.data.decoding import square
from tune_study.data.folders import find
from tune_study.data.place import Place
from tune_study.errors import UserError


@pytest.fixture
def root(tmp_path):
    root = class_folders(tmp_path / "d", a=3, b=4)
    for path in root.rglob("*.png"):  # as files are that have lain there for a while
        os.utime(path, ns=(1, 1))
    return root


@pytest.fixture
def settled(monkeypatch):
    """Files may be new: their times count at once."""
    monkeypatch.setattr(cache, "SETTLES_NS", -(10**15))


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded, and those that were read."""
    seen = {"decoded": [], "read": []}

    def spy(name, module, function):
        before = getattr(module, function)
        monkeypatch.setattr(
            module,
            function,
            lambda path, *more: seen[name].append(str(path)) or before(path, *more),
        )

    spy("decoded", decoding, "square")
    spy("read", cache, "_digest")
    return seen


def content(found):
    return np.fromfile(found.path, np.uint8).reshape(found.shape)


def test_every_image_stands_at_its_place(root, place):
    found = find(root)
    made = cache.pixels(found, HOW, place)
    assert made.path.parent == place.cache_dir / "images"
    assert made.broken == {}
    for pixels, path in zip(content(made), found.paths, strict=True):
        assert np.array_equal(pixels, square(Path(path), 8, "bicubic"))


def test_images_are_decoded_once_and_read_once(root, place, decoded, settled):
    first = cache.pixels(find(root), HOW, place)
    assert len(decoded["decoded"]) == len(decoded["read"]) == 7
    assert cache.pixels(find(root), HOW, place) == first
    assert len(decoded["decoded"]) == len(decoded["read"]) == 7
    os.utime(root / "a" / "000.png")
    assert cache.pixels(find(root), HOW, place) == first  # read again, and found the same
    assert (len(decoded["decoded"]), len(decoded["read"])) == (7, 14)
    shutil.copytree(root, root.with_name("copy"))
    assert cache.pixels(find(root.with_name("copy")), HOW, place) == first
    assert len(decoded["decoded"]) == 7
    assert cache.pixels(find(root), HOW._replace(image_size=4), place).path != first.path
    assert (len(decoded["decoded"]), len(decoded["read"])) == (14, 21)


def test_changed_images_are_another_file(root, place, settled):
    first = cache.pixels(find(root), HOW, place)
    (root / "a" / "000.png").write_bytes((root / "a" / "001.png").read_bytes())
    second = cache.pixels(find(root), HOW, place)
    assert first.path != second.path
    assert np.array_equal(content(second)[0], content(second)[1])


def test_files_that_were_just_written_are_read_again(root, place, decoded):
    """They may change under the same time: the system's clock ticks seldom."""
    cache.pixels(find(root), HOW, place)
    cache.pixels(find(root), HOW, place)
    assert (len(decoded["decoded"]), len(decoded["read"])) == (7, 14)


def test_files_that_change_while_they_are_read_are_read_again(root, place, settled, monkeypatch):
    digest = cache._digest

    def change(path):
        os.utime(path)
        return digest(path)

    monkeypatch.setattr(cache, "_digest", change)
    cache.contents(find(root), place)
    assert list((place.cache_dir / "images").glob("*.files.json")) == []


def test_what_cannot_be_read_is_remembered_with_its_reason(root, place, decoded):
    (root / "b" / "000.png").write_bytes(b"x")
    for _ in range(2):
        assert cache.pixels(find(root), HOW, place).broken == {3: "it is no image"}
    assert len(decoded["decoded"]) == 7
    assert not content(cache.pixels(find(root), HOW, place))[3].any()


@pytest.mark.parametrize("kind", ["pixels", "json", "files.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "other", "text"])
def test_what_is_not_whole_in_the_cache_is_made_anew(root, place, settled, kind, how):
    whole = content(cache.pixels(find(root), HOW, place))
    suffix = ".files.json" if kind == "files.json" else f"bicubic.{kind}"
    (file,) = (place.cache_dir / "images").glob(f"*{suffix}")
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "other":
        file.write_bytes(json.dumps({"stamp": 1, "shape": [1], "broken": []}).encode())
    else:
        file.write_bytes(b"\xff\0nothing")
    assert np.array_equal(content(cache.pixels(find(root), HOW, place)), whole)


def test_a_filling_that_ends_early_leaves_nothing(root, place, monkeypatch):
    def stop(path, *more):
        raise (
            KeyboardInterrupt
            if "b" in os.path.basename(os.path.dirname(path))
            else OSError(28, "No space")
        )

    for error in (KeyboardInterrupt, UserError):
        monkeypatch.setattr(
            decoding,
            "square",
            lambda *given, e=error: (_ for _ in ()).throw(
                KeyboardInterrupt() if e is KeyboardInterrupt else OSError(28, "No space left")
            ),
        )
        with pytest.raises(error):
            cache.pixels(find(root), HOW, place)
        assert [p.suffix for p in (place.cache_dir / "images").iterdir()] in (
            [".lock"],
            [".json", ".lock"],
        )
    monkeypatch.undo()
    assert content(cache.pixels(find(root), HOW, place)).any()


def test_what_a_killed_process_left_is_taken_away(root, place):
    folder = place.cache_dir / "images"
    made = cache.pixels(find(root), HOW, place)
    made.path.unlink()
    left = folder / f".{made.path.name}.1.tmp"
    left.write_bytes(b"half")
    cache.pixels(find(root), HOW, place)
    assert not left.exists()


def test_one_fills_and_the_others_wait(root, place, decoded, capsys):
    found = find(root)
    begun, go_on = threading.Event(), threading.Event()
    square_ = decoding.square

    def slow(*given):
        begun.set()
        assert go_on.wait(30)
        return square_(*given)

    decoding.square, made = slow, []
    try:
        threads = [
            threading.Thread(target=lambda: made.append(cache.pixels(found, HOW, place)))
            for _ in range(3)
        ]
        threads[0].start()
        assert begun.wait(30)
        for thread in threads[1:]:
            thread.start()
        while capsys.readouterr().err.count("waiting for another process") == 0:
            pass
        go_on.set()
        for thread in threads:
            thread.join()
    finally:
        decoding.square = square_
    assert made == [made[0]] * 3
    assert len(decoded["decoded"]) == 7


def test_a_disk_without_room_is_named_before_anything_is_written(root, place, monkeypatch):
    usage = shutil.disk_usage(root)
    needed = 7 * 3 * 64
    for free in (cache.LEFT_FREE_BYTES + needed - 1, cache.LEFT_FREE_BYTES + needed):
        monkeypatch.setattr(
            cache.shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free)
        )
        if free < cache.LEFT_FREE_BYTES + needed:
            with pytest.raises(
                UserError, match=r"--cache-dir: 7 images of 8 px take 0.0 GB of .*0.3 GB"
            ):
                cache.pixels(find(root), HOW, place)
            assert list((place.cache_dir / "images").glob("*.pixels")) == []
        else:
            cache.pixels(find(root), HOW, place)


def test_a_cache_that_cannot_be_written_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--cache-dir: .*file/images cannot be written .*; name another"
    ):
        cache.pixels(find(root), HOW, Place(cache_dir=tmp_path / "file"))


def test_many_images_are_worth_a_line(root, place, monkeypatch, capsys):
    cache.contents(find(root), place)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cache, "MANY", 7)
    cache.contents(find(root), place)
    assert capsys.readouterr().err == f"looking at the files of folder:{root}: 7\n"
