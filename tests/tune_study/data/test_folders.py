"""Which files of a folder are images of which class, against torchvision's ImageFolder."""

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tests.tune_study.data.pictures import class_folders
from tune_study.data.folders import find, passed_over
from tune_study.errors import UserError


def test_classes_order_and_labels_are_image_folders(tmp_path):
    class_folders(tmp_path, dog=3, cat=2, **{"10": 2, "2": 1, "Ape": 1})
    more = class_folders(tmp_path / "cat", **{"more/a": 2, "more/b": 1, "again": 1}) / "more"
    more.joinpath("a", "000.png").rename(more / "a" / "0.JPEG")
    theirs = ImageFolder(tmp_path)
    found = find(tmp_path)
    images = found.parts["train"]
    assert found.class_names == theirs.classes == ["10", "2", "Ape", "cat", "dog"]
    assert list(zip(images.paths, images.labels.tolist(), strict=True)) == theirs.samples
    assert list(found.parts) == ["train"]
    assert passed_over(found) == ""


def test_every_suffix_of_pillow_counts_in_any_case(tmp_path):
    class_folders(tmp_path, a=6, b=1)
    for n, name in enumerate(("0.jfif", "1.TIF", "2.Gif", "3.avif", "4.JP2")):
        (tmp_path / "a" / f"00{n}.png").rename(tmp_path / "a" / name)
    assert len(find(tmp_path).paths) == 7


def test_leftovers_are_passed_over_and_counted(tmp_path):
    class_folders(tmp_path, a=2, b=2)
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"):
        (tmp_path / "a" / name).write_text("x")
    for folder in ("__MACOSX/a", ".git", "b/.ipynb_checkpoints", "b/@eaDir"):
        class_folders(tmp_path, **{folder: 1})
    (tmp_path / "Thumbs.db").write_text("x")
    found = find(tmp_path)
    assert found.class_names == ["a", "b"]
    assert len(found.paths) == 4
    assert passed_over(found) == "10 hidden or of the system"


def test_what_is_no_image_or_has_no_class_is_counted(tmp_path):
    class_folders(tmp_path, a=2, b=2)
    for name in ("a/notes.txt", "a/more.txt", "b/photo.heic", "b/noname", "labels.csv"):
        (tmp_path / name).write_text("x")
    Image.new("L", (3, 3)).save(tmp_path / "loose.png")
    assert passed_over(find(tmp_path)) == (
        "5 no images (1 without a suffix, 1 .csv, 1 .heic, 2 .txt), 1 images outside of class "
        "folders"
    )


PARTS = [
    ("train", "val", "test"),
    ("Train", "Valid", "TEST"),
    ("training", "validation", "testing"),
]


@pytest.mark.parametrize(("train", "val", "test"), PARTS)
def test_parts_are_used_as_they_are_called(tmp_path, train, val, test):
    for part, count in ((train, 4), (val, 3), (test, 2)):
        class_folders(tmp_path / part, a=count, b=1)
    found = find(tmp_path)
    sizes = {part: len(images.paths) for part, images in found.parts.items()}
    assert sizes == {"train": 5, "val": 4, "test": 3}
    assert found.parts["val"].labels.tolist() == [0, 0, 0, 1]
    assert found.paths[5].startswith(str(tmp_path / val / "a"))
    assert found.shown(found.paths[5]) == os.path.join(val, "a", "000.png")


@pytest.mark.parametrize(
    ("others", "parts"),
    [(["val"], ["train", "val"]), (["test"], ["train", "test"]), ([], ["train"])],
)
def test_a_part_may_be_missing(tmp_path, others, parts):
    for part in ("train", *others):
        class_folders(tmp_path / part, a=2, b=2)
    assert list(find(tmp_path).parts) == parts


def test_a_part_without_classes_is_missing_and_its_images_are_counted(tmp_path):
    class_folders(tmp_path / "train", a=2, b=2)
    class_folders(tmp_path, test=3)
    found = find(tmp_path)
    assert list(found.parts) == ["train"]
    assert passed_over(found) == "3 images outside of class folders"


def test_a_train_among_classes_is_a_class(tmp_path):
    class_folders(tmp_path, train=2, bus=1)
    assert find(tmp_path).class_names == ["bus", "train"]


def test_other_folders_beside_parts_are_counted(tmp_path):
    for part in ("train", "test"):
        class_folders(tmp_path / part, a=2, b=2)
    class_folders(tmp_path, **{"unlabeled/x": 3})
    assert passed_over(find(tmp_path)) == "3 images outside of class folders"


def test_a_class_may_be_missing_from_the_test_and_none_be_added(tmp_path):
    class_folders(tmp_path / "train", a=2, b=2, c=2)
    class_folders(tmp_path / "test", a=2, c=1)
    assert find(tmp_path).parts["test"].labels.tolist() == [0, 0, 2]
    class_folders(tmp_path / "test", d=1)
    with pytest.raises(UserError, match=r"test/d is no class of the training images \(a, b, c\)"):
        find(tmp_path)


def test_names_are_the_same_however_a_system_writes_them(tmp_path):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        class_folders(tmp_path / part, **{unicodedata.normalize(form, "été"): 2, "b": 1})
    found = find(tmp_path)
    assert found.class_names == ["b", unicodedata.normalize("NFC", "été")]
    assert found.parts["test"].labels.tolist() == [0, 1, 1]
    class_folders(tmp_path / "train", **{unicodedata.normalize("NFD", "été"): 2})
    with pytest.raises(UserError, match="two folders that read été; merge them"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["one"], "at least two class folders with images, and .* has 1; make a folder"),
        ([], "has 0; make a folder"),
        (["data/a", "data/b"], "did you mean folder:.*data\\?"),
        (["val/a", "val/b", "test/a", "test/b"], "it has test and val and no train; add it"),
        (["train/a", "train/b", "val/a", "valid/a"], "val and valid are both val; take one away"),
    ],
)
def test_folders_that_cannot_be_are_one_sentence(tmp_path, names, words):
    class_folders(tmp_path, **dict.fromkeys(names, 1))
    with pytest.raises(UserError, match=words):
        find(tmp_path)


def test_missing_folders_and_empty_classes_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        find(tmp_path / "none")
    class_folders(tmp_path, a=1, b=0)
    (tmp_path / "b" / "x.heic").write_text("x")
    with pytest.raises(UserError, match=r"b holds no images \(1 .heic\); add some, or take"):
        find(tmp_path)


def test_links_are_followed_and_a_loop_of_them_once(tmp_path):
    class_folders(tmp_path / "elsewhere", a=2)
    class_folders(tmp_path / "d", b=1)
    (tmp_path / "d" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "d" / "b" / "again").symlink_to(tmp_path / "d" / "b")
    (tmp_path / "d" / "b" / "gone.png").symlink_to("nowhere")
    found = find(tmp_path / "d")
    assert found.parts["train"].labels.tolist() == [0, 0, 1, 1]
    assert found.paths[-1].endswith("gone.png")  # named as broken, when it is read


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path, a=1, b=1)
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"b cannot be read .Permission denied.; make it readable"):
        find(tmp_path)


def test_the_stamp_tells_every_touch(tmp_path):
    class_folders(tmp_path, a=2, b=2)
    seen = [find(tmp_path).stamp()[0]]
    assert find(tmp_path).stamp()[0] == seen[0]
    file = tmp_path / "a" / "000.png"
    times = file.stat()

    def rewrite():
        """Other content of the same length, under the old times."""
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    for change in (
        rewrite,
        lambda: os.utime(file, ns=(1, 1)),
        lambda: file.rename(tmp_path / "a" / "9.png"),
        lambda: (tmp_path / "b" / "000.png").unlink(),
        lambda: (tmp_path / "b").rename(tmp_path / "c"),
        lambda: (tmp_path / "a" / "gone.png").symlink_to("nowhere"),
    ):
        change()
        seen.append(find(tmp_path).stamp()[0])
    assert len(set(seen)) == 7
    newest = max(
        os.stat(tmp_path / "c" / "001.png").st_ctime_ns,
        os.stat(tmp_path / "a" / "9.png").st_ctime_ns,
    )
    assert find(tmp_path).stamp()[1] == newest
