import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad
from torchvision import datasets

from tune_study import data
from tune_study.config import DataConfig, UserError
from tune_study.data import Preprocessing, Split


@pytest.fixture(autouse=True)
def _no_cache():
    data.read_source.cache_clear()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, images, labels, column="label", names=None):
    folder.mkdir(parents=True, exist_ok=True)
    feature = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pa.table({"img": pa.array(rows, feature), column: pa.array(labels, pa.int64())})
    if names:
        info = {"info": {"features": {column: {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    for part in ("train", "test"):
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


@pytest.fixture
def images(request):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), [i % 4 for i in range(40)]


def test_digits_are_stretched_to_bytes_and_split_without_overlap():
    digits = data.load("digits", None, DataConfig())
    sizes = [len(split.labels) for split in digits[:3]]
    assert sum(sizes) == 1797
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape[1:] == (3, 8, 8)
    assert int(digits.train.images.max()) == 255
    splits = [{bytes(i.numpy().tobytes()) for i in split.images} for split in digits[:3]]
    distinct = len(set.union(*splits))
    assert distinct == sum(len(s) for s in splits)  # no digit image is in two splits


def test_the_split_is_the_same_each_time_and_stratified():
    first = data.load("digits", None, DataConfig(train_size=100, val_size=50, test_size=30))
    data.read_source.cache_clear()
    again = data.load("digits", None, DataConfig(train_size=100, val_size=50, test_size=30))
    for a, b, size in zip(first[:3], again[:3], (100, 50, 30), strict=True):
        assert torch.equal(a.images, b.images)
        counts = torch.bincount(a.labels, minlength=10)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1 + size // 50
    assert first.sha256 == again.sha256


def test_smaller_training_sets_keep_validation_and_test_images():
    large = data.load("digits", None, DataConfig())
    small = data.load("digits", None, DataConfig(train_size=50))
    assert torch.equal(large.val.images, small.val.images)
    assert torch.equal(large.test.images, small.test.images)


@pytest.mark.parametrize("sizes", [{"train_size": 9999}, {"val_size": 3}, {"test_size": 5000}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(UserError, match=f"data.{next(iter(sizes))}"):
        data.load("digits", None, DataConfig(**sizes))


def test_hugging_face_parquet(tmp_path, images):
    write_parquet(tmp_path / "cifar10", *images, names=["a", "b", "c", "d"])
    source = data.read_source("cifar10", tmp_path)
    assert source.class_names == ["a", "b", "c", "d"]
    expected = torch.as_tensor(images[0]).permute(0, 3, 1, 2)
    assert torch.equal(source.train.images, expected)
    assert source.train.labels.tolist() == images[1]


def test_cifar100_uses_fine_labels(tmp_path, images):
    write_parquet(tmp_path / "cifar100", *images, column="fine_label")
    assert data.read_source("cifar100", tmp_path).train.labels.tolist() == images[1]
    with pytest.raises(UserError, match="no cifar10 in it"):
        data.read_source("cifar10", tmp_path / "cifar100")


def test_torchvision_layout_gives_the_same_checksum_as_parquet(tmp_path, images, monkeypatch):
    """The same images are the same data set, whatever files they come in."""
    pixels, labels = images
    folder = tmp_path / "tv" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": flat, "labels": labels}))
    meta = pickle.dumps({"label_names": ["a", "b", "c", "d"]})
    (folder / "batches.meta").write_bytes(meta)

    def md5(name):
        import hashlib

        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5("data_batch_1")]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")},
    )
    write_parquet(tmp_path / "hf" / "cifar10", *images, names=["a", "b", "c", "d"])
    from_torchvision = data.read_source("cifar10", tmp_path / "tv")
    from_parquet = data.read_source("cifar10", tmp_path / "hf")
    assert from_torchvision.sha256 == from_parquet.sha256
    assert from_torchvision.class_names == from_parquet.class_names

    data.read_source.cache_clear()
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # would run a command
    with pytest.raises(UserError, match="not found or corrupted"):
        data.read_source("cifar10", tmp_path / "tv")


@pytest.mark.parametrize("damage", ["truncate", "image", "text"])
def test_a_corrupt_file_is_named(tmp_path, images, damage):
    write_parquet(tmp_path / "cifar10", *images)
    path = tmp_path / "cifar10" / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("<html>not found</html>")
    else:
        table = pq.read_table(path)
        broken = pa.array([{"bytes": b"x", "path": None}] * 40, table["img"].type)
        pq.write_table(table.set_column(0, "img", broken), path)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read"):
        data.read_source("cifar10", tmp_path)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="--data-dir"):
            data.read_source("cifar10", folder)


def test_no_network_names_the_remedy(tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data, "DEFAULT_DATA_DIR", tmp_path)
    with pytest.raises(UserError, match="--data-dir"):
        data.read_source("cifar10", None)


def test_class_folders(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(10):
            image = np.full((30, 20 + index, 3), 100 * label + index, np.uint8)
            (tmp_path / name / f"{index}.png").write_bytes(png(image))
    dataset = data.load(f"folder:{tmp_path}", None, DataConfig())
    assert dataset.class_names == ["cat", "dog"]
    assert [len(split.labels) for split in dataset[:3]] == [14, 2, 4]
    (tmp_path / "dog" / "3.png").write_bytes(b"nothing")
    data.read_source.cache_clear()
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        data.load(f"folder:{tmp_path}", None, DataConfig())


def test_class_folders_with_parts_of_their_own(tmp_path):
    for part, count in (("train", 20), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                path = tmp_path / part / name / f"{index}.png"
                path.write_bytes(png(np.full((9, 9, 3), index, np.uint8)))
    dataset = data.load(f"folder:{tmp_path}", None, DataConfig())
    assert [len(split.labels) for split in dataset[:3]] == [36, 4, 6]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 56, 224])
def test_preprocess_is_what_pillow_makes_of_each_image(size: int, interpolation: str):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.3, 0.4])
    filter = Image.Resampling[interpolation.upper()]
    expected = [
        (np.asarray(Image.fromarray(image).resize((size, size), filter)) / 255 - mean) / std
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    how = Preprocessing(size, interpolation, tuple(mean.tolist()), tuple(std.tolist()))
    cropped = images.contiguous(memory_format=torch.channels_last)  # as augment leaves them
    for given in (images, cropped):
        pixels = data.preprocess(given, how).permute(0, 2, 3, 1).numpy()
        levels = (pixels - np.stack(expected)) * std * 255
        assert np.abs(levels).max() < 2.01  # whole levels, and the rounding of floats
        assert np.abs(levels).mean() < 0.3
    assert images.dtype == torch.uint8


def test_crop_equals_the_slow_obvious_version():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    cropped = data.augment(images, "crop", torch.Generator().manual_seed(3))
    offsets = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(3))
    padded = pad(images, (4, 4, 4, 4))
    for i, (top, left) in enumerate(offsets.T.tolist()):
        assert torch.equal(cropped[i], padded[i, :, top : top + 32, left : left + 32])


def test_flip_mirrors_about_half_of_the_images():
    images = torch.arange(32, dtype=torch.uint8).expand(2000, 3, 32, 32)
    changed = data.augment(images, "flip-crop", torch.Generator().manual_seed(0))
    slope = (changed[:, 0, 16, 20].int() - changed[:, 0, 16, 12].int()).sign()
    assert set(slope.tolist()) == {-1, 1}
    assert abs(float(slope.float().mean())) < 0.1


def test_digits_are_never_mirrored():
    assert data.augmentation("digits", DataConfig()) == "crop"
    assert data.augmentation("cifar10", DataConfig()) == "flip-crop"
    assert data.augmentation("cifar10", DataConfig(augment="none")) == "none"


def test_train_batches_show_every_image_once_in_an_order_of_the_generator():
    split = Split(torch.arange(50).view(50, 1, 1, 1).expand(50, 3, 4, 4).byte(), torch.arange(50))
    batches = list(data.train_batches(split, 16, "none", torch.Generator().manual_seed(1)))
    labels = torch.cat([b for _, b in batches])
    assert [len(b) for _, b in batches] == [16, 16, 16, 2]
    assert labels.sort().values.tolist() == list(range(50))
    assert labels.tolist() != list(range(50))
    for images, targets in batches:
        assert torch.equal(images[:, 0, 0, 0].long(), targets)


def test_real_cifar(cifar_dir):
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        sizes = DataConfig(train_size=200, val_size=100, test_size=200)
        dataset = data.load(name, cifar_dir, sizes)
        assert len(dataset.class_names) == classes
        assert dataset.train.images.shape == (200, 3, 32, 32)
