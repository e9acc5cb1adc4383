"""A folder of images as a trial sees it: decoded into the cache, split, told."""

import os

import pytest
import torch
from PIL import Image

from tests.tune_study.data.pictures import HOW, class_folders, noise
from tune_study.config import DataConfig
from tune_study.data import cache, sources
from tune_study.data.place import Place
from tune_study.data.splits import load, outline
from tune_study.errors import UserError


@pytest.fixture(autouse=True)
def _no_cache():
    sources.read_source.cache_clear()


def loaded(root, place, how=HOW, **sizes):
    sources.read_source.cache_clear()
    return load(f"folder:{root}", place, DataConfig(**sizes), how)


def pixels(split):
    return split.images[:]


def expected(path, how=HOW):
    image = Image.open(path)
    image = image.resize((how.image_size,) * 2, Image.Resampling[how.interpolation.upper()])
    return (
        torch.tensor(list(image.tobytes())).view(how.image_size, how.image_size, 3).permute(2, 0, 1)
    )


def test_classes_are_split_by_the_fixed_seed(tmp_path, place):
    root = class_folders(tmp_path / "d", cat=10, dog=10)
    found = loaded(root, place)
    assert found.class_names == ["cat", "dog"]
    assert [len(split.labels) for split in found[:3]] == [14, 2, 4]
    assert found.train.labels.dtype == torch.int64
    assert found.train.images.shape == (14, 3, 8, 8)
    every = {tuple(i.flatten().tolist()) for split in found[:3] for i in pixels(split)}
    theirs = [tuple(expected(path).flatten().tolist()) for path in sorted(root.rglob("*.png"))]
    assert every == set(theirs)
    assert len(every) == 20
    assert found.outline.told == (
        f"folder:{root}: 20 images of 2 classes; 14 to train on, 2 for validation (split off "
        "train), 4 for the test (split off train)"
    )


def test_parts_are_used_as_such_and_a_missing_one_is_split_off(tmp_path, place):
    root = tmp_path / "d"
    for part, count in (("train", 20), ("valid", 4), ("test", 3)):
        class_folders(root / part, a=count, b=count)
    found = loaded(root, place)
    assert [len(split.labels) for split in found[:3]] == [40, 8, 6]
    assert torch.equal(pixels(found.val)[1], expected(root / "valid" / "a" / "001.png").byte())
    assert "40 to train on, 8 for validation, 6 for the test" in found.outline.told
    assert [len(s.labels) for s in loaded(root, place, val_size=4, test_size=2)[:3]] == [40, 4, 2]
    (root / "valid").rename(tmp_path / "away")
    found = loaded(root, place)
    assert [len(split.labels) for split in found[:3]] == [36, 4, 6]
    assert "36 to train on, 4 for validation (split off train), 6 for" in found.outline.told
    (tmp_path / "away").rename(root / "val")
    (root / "test").rename(tmp_path / "away")
    assert [len(split.labels) for split in loaded(root, place)[:3]] == [32, 8, 8]
    with pytest.raises(UserError, match=r"data\.val_size = 9: folder:.* has 8 images for it"):
        loaded(root, place, val_size=9)


def test_images_are_at_the_side_that_the_model_wants_and_not_enlarged(tmp_path, place):
    root = class_folders(tmp_path / "d", side=20, a=5, b=5)
    for side, held in ((8, 8), (19, 19), (20, 20), (400, 20)):
        images = loaded(root, place, HOW._replace(image_size=side)).train.images
        assert images.shape[1:] == (3, held, held)
    other = HOW._replace(interpolation="bilinear")
    assert not torch.equal(
        pixels(loaded(root, place).test), pixels(loaded(root, place, other).test)
    )
    Image.fromarray(noise(5, 50, 90)).save(root / "a" / "large.png")
    big = loaded(root, place, HOW._replace(image_size=400)).train.images
    assert big.shape[1:] == (3, 50, 50)


def test_the_identity_is_of_images_classes_and_parts_wherever_they_lie(tmp_path, place):
    root = class_folders(tmp_path / "d", a=5, b=5)
    first = loaded(root, place).sha256
    assert len(first) == 64
    assert loaded(root, place, HOW._replace(image_size=4)).sha256 == first
    root.rename(tmp_path / "elsewhere")
    root = tmp_path / "elsewhere"
    os.utime(root / "a" / "000.png")
    assert loaded(root, place).sha256 == first
    sums = [first]
    for change in (
        lambda: (root / "a").rename(root / "c"),
        lambda: (root / "c" / "000.png").rename(root / "c" / "9.png"),
        lambda: (root / "c" / "9.png").rename(root / "b" / "9.png"),
        lambda: Image.fromarray(noise(77)).save(root / "b" / "9.png"),
    ):
        change()
        sums.append(loaded(root, place).sha256)
    assert len(set(sums)) == 5


def broken_folder(tmp_path):
    root = class_folders(tmp_path / "d", a=10, b=10)
    (root / "a" / "003.png").write_bytes(b"nothing")
    whole = (root / "b" / "001.png").read_bytes()
    (root / "b" / "001.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "gone.png").symlink_to("nowhere")
    return root


def test_all_broken_files_are_named_together(tmp_path, place):
    root = broken_folder(tmp_path)
    for look in (load, outline):
        with pytest.raises(UserError) as caught:
            look(f"folder:{root}", place, DataConfig(), HOW)
        said = str(caught.value)
        assert "3 of 21 images cannot be read: a/003.png (it is no image), b/001.png (" in said
        assert "b/gone.png (no such file or directory)" in said
        assert said.endswith("or leave them out with --leave-out-broken")


def test_broken_files_are_left_out_when_asked_for(tmp_path, place):
    root = broken_folder(tmp_path)
    place = place._replace(leave_out_broken=True)
    found = loaded(root, place)
    assert sum(len(split.labels) for split in found[:3]) == 18
    assert len(found.outline.left_out) == 3
    assert found.outline.left_out[0] == "a/003.png (it is no image)"
    assert found.outline.told.endswith("; left out, for they cannot be read: 3")
    assert outline(f"folder:{root}", place, DataConfig(), HOW) == found.outline
    for name in ("a/003.png", "b/001.png", "b/gone.png"):
        (root / name).unlink()
    without = loaded(root, place)
    assert without.sha256 == found.sha256
    for ours, theirs in zip(without[:3], found[:3], strict=True):
        assert torch.equal(pixels(ours), pixels(theirs))
        assert torch.equal(ours.labels, theirs.labels)


def test_a_folder_of_broken_files_alone_is_refused(tmp_path, place):
    root = class_folders(tmp_path / "d", a=1, b=1)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 2 images cannot be read.*whole ones$"):
        loaded(root, place._replace(leave_out_broken=True))


def test_a_class_of_broken_files_alone_is_refused(tmp_path, place):
    root = class_folders(tmp_path / "d", a=5, b=2, c=5)
    for path in (root / "b").glob("*.png"):
        path.write_bytes(b"")
    for look in (load, outline):
        with pytest.raises(UserError, match="no training image of class b can be read"):
            look(f"folder:{root}", place._replace(leave_out_broken=True), DataConfig(), HOW)


def test_hundreds_of_broken_files_stand_in_a_file(tmp_path, place, monkeypatch):
    monkeypatch.setattr(cache, "NAMED", 2)
    root = broken_folder(tmp_path)
    with pytest.raises(UserError, match=r"and 1 more, all in .*broken\.txt"):
        loaded(root, place)
    lines = (tmp_path / "cache" / "images" / "broken.txt").read_text().splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("b/gone.png (no such")


def test_counting_needs_no_cache_and_opens_small_folders_alone(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "d", a=10, b=10)
    nowhere = Place(cache_dir=tmp_path / "none")
    seen = outline(f"folder:{root}", nowhere, DataConfig(train_size=6), HOW)
    assert seen[:4] == (2, 6, 2, 4)
    assert not (tmp_path / "none").exists()
    (root / "a" / "000.png").write_bytes(b"")
    monkeypatch.setattr(sources, "LOOKED_THROUGH", 20)
    with pytest.raises(UserError, match="1 of 20 images"):
        outline(f"folder:{root}", nowhere, DataConfig(), HOW)
    monkeypatch.setattr(sources, "LOOKED_THROUGH", 19)
    assert outline(f"folder:{root}", nowhere, DataConfig(), HOW).train == 14


def test_an_outline_of_digits_is_what_would_be_loaded():
    sizes = DataConfig(train_size=200, test_size=100)
    assert outline("digits", Place(), sizes) == load("digits", Place(), sizes).outline
    assert outline("digits", Place(), sizes)[:4] == (10, 200, 144, 100)


@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_of_cifar_the_sizes_are_known(dataset, classes):
    assert outline(dataset, Place(), DataConfig())[:4] == (classes, 45_000, 5_000, 10_000)
    seen = outline(dataset, Place(), DataConfig(train_size=500, val_size=200, test_size=300))
    assert seen == (classes, 500, 200, 300, "", ())
    with pytest.raises(UserError, match=r"data\.train_size = 60000"):
        outline(dataset, Place(), DataConfig(train_size=60_000))
