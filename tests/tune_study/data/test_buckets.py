"""Images behind a URI: each file fetched once, and the sentences name the URI."""

import os
import shutil
import urllib.request

import numpy as np
import pytest

from tests.e2e import s3
from tests.tune_study.data.pictures import HOW, class_folders
from tune_study.data import buckets, cache
from tune_study.data.folders import find, passed_over
from tune_study.data.names import Names, is_bucket
from tune_study.data.place import Place
from tune_study.errors import UserError
from tune_study.folder import remote


@pytest.fixture
def there(tmp_path):
    root = class_folders(tmp_path / "there", a=3, b=4)
    (root / "a" / "notes.txt").write_text("some words")
    return root


@pytest.fixture
def fetched(monkeypatch):
    names = []
    read = remote.read
    monkeypatch.setattr(remote, "read", lambda where, name: names.append(name) or read(where, name))
    return names


def mirror(there, place, **how):
    with buckets.folder_of(f"folder:{there.as_uri()}", place, **how) as root:
        return find(root)


def test_the_mirror_has_the_same_images(there, place):
    found, theirs = mirror(there, place), find(there)
    assert found.root.parent == place.cache_dir / "fetched"
    ours, local = (cache.pixels(some, HOW, place) for some in (found, theirs))
    assert ours.path == local.path
    assert ours.contents == local.contents
    assert passed_over(found) == passed_over(theirs) == "1 no images (1 .txt)"


def test_what_is_here_is_not_fetched_again(there, place, fetched):
    mirror(there, place)
    assert sorted(fetched) == sorted(p.relative_to(there).as_posix() for p in there.rglob("*.png"))
    fetched.clear()
    mirror(there, place)
    assert fetched == []
    changed = there / "a" / "000.png"
    status = changed.stat()
    changed.write_bytes((there / "b" / "000.png").read_bytes())
    os.utime(changed, ns=(status.st_mtime_ns + 10**9,) * 2)
    (there / "b" / "003.png").unlink()
    found = mirror(there, place)
    assert fetched == ["a/000.png"]
    assert len(found.paths) == 6


def test_a_fetch_that_was_cut_off_goes_on(there, place, monkeypatch, fetched):
    read = remote.read

    def until(where, name):
        if name == "b/000.png":
            raise remote.RemoteError("the store is gone")
        return read(where, name)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "read", until)
        patch.setattr(buckets, "AT_A_TIME", 1)
        with pytest.raises(UserError, match="dataset folder:the store is gone"):
            mirror(there, place)
    before = list(fetched)
    assert 0 < len(before) < 7
    assert len(mirror(there, place).paths) == 7
    assert sorted(fetched) == sorted(set(fetched))
    assert len(fetched) == 7


def test_a_file_that_changes_meanwhile_is_no_image(there, place, monkeypatch):
    monkeypatch.setattr(remote, "read", lambda where, name: b"half")
    with pytest.raises(UserError, match=r"00\d.png changed while it was fetched"):
        mirror(there, place)


def test_a_dry_run_looks_at_the_names_alone(there, place, fetched):
    found = mirror(there, place, names_only=True)
    assert len(found.paths) == 7
    assert fetched == []
    assert not place.cache_dir.exists()


def test_sentences_name_the_uri(there, place, tmp_path):
    shutil.rmtree(there / "b")
    uri = there.as_uri()
    with pytest.raises(UserError, match=f"^dataset folder:{uri}: it needs at least two class"):
        mirror(there, place)
    with pytest.raises(UserError, match=f"^dataset folder:{uri}x: there are no files; write it"):
        mirror(there.with_name("therex"), place)
    with (
        pytest.raises(UserError, match=r"^dataset folder:nonsense://x/y can't be used \("),
        buckets.folder_of("folder:nonsense://x/y", place),
    ):
        pass
    secret = "folder:s3://KEY:SECRET@bucket/images"
    with (
        pytest.raises(UserError, match=r"^dataset folder:s3://\*\*\*@bucket/images: study.json"),
        buckets.folder_of(secret, place),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache-dir: .*file/fetched.* cannot be written"):
        mirror(there, Place(cache_dir=tmp_path / "file"))


def test_a_disk_without_room_is_told_before_anything_is_fetched(there, place, monkeypatch, fetched):
    usage = shutil.disk_usage(there)._replace(free=cache.LEFT_FREE_BYTES)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=f"--cache-dir: 8 files of {there.as_uri()} take"):
        mirror(there, place)
    assert fetched == []
    monkeypatch.undo()
    mirror(there, place)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    mirror(there, place)  # nothing is missing


def test_a_uri_is_a_name_already():
    assert is_bucket("folder:s3://bucket/images")
    assert not is_bucket("folder:images")
    assert not is_bucket("digits")
    assert Names().of("folder:s3://bucket/images/") == "folder:s3://bucket/images"


@pytest.mark.slow
@pytest.mark.ci
def test_images_of_a_bucket(there, place, tmp_path, monkeypatch, fetched):
    with s3.server(tmp_path / "log.txt") as endpoint:
        for name, value in s3.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/pictures", method="PUT")):
            store = remote.open_remote("s3://pictures/leaves")
        for path in there.rglob("*.*"):
            remote.write(store, path.relative_to(there).as_posix(), path.read_bytes())
        for _ in range(2):
            with buckets.folder_of("folder:s3://pictures/leaves", place) as root:
                made = cache.pixels(find(root), HOW, place)
        assert len(fetched) == 7
    local = cache.pixels(find(there), HOW, place)
    assert np.fromfile(made.path, np.uint8).any()
    assert made.path == local.path
