import io
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import datasets

from tune_study.config import DataConfig
from tune_study.data import sources, splits
from tune_study.errors import UserError


@pytest.fixture(autouse=True)
def _no_cache():
    sources.read_source.cache_clear()


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


def test_hugging_face_parquet(tmp_path, images):
    write_parquet(tmp_path / "cifar10", *images, names=["a", "b", "c", "d"])
    source = sources.read_source("cifar10", tmp_path)
    assert source.class_names == ["a", "b", "c", "d"]
    expected = torch.as_tensor(images[0]).permute(0, 3, 1, 2)
    assert torch.equal(source.train.images, expected)
    assert source.train.labels.tolist() == images[1]


def test_cifar100_uses_fine_labels(tmp_path, images):
    write_parquet(tmp_path / "cifar100", *images, column="fine_label")
    assert sources.read_source("cifar100", tmp_path).train.labels.tolist() == images[1]
    with pytest.raises(UserError, match="no cifar10 in it"):
        sources.read_source("cifar10", tmp_path / "cifar100")


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
    from_torchvision = sources.read_source("cifar10", tmp_path / "tv")
    from_parquet = sources.read_source("cifar10", tmp_path / "hf")
    assert from_torchvision.sha256 == from_parquet.sha256
    assert from_torchvision.class_names == from_parquet.class_names

    sources.read_source.cache_clear()
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # would run a command
    with pytest.raises(UserError, match="not found or corrupted"):
        sources.read_source("cifar10", tmp_path / "tv")


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
        sources.read_source("cifar10", tmp_path)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="--data-dir"):
            sources.read_source("cifar10", folder)


def test_no_network_names_the_remedy(tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(sources, "DEFAULT_DATA_DIR", tmp_path)
    with pytest.raises(UserError, match="--data-dir"):
        sources.read_source("cifar10", None)


def test_class_folders(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(10):
            image = np.full((30, 20 + index, 3), 100 * label + index, np.uint8)
            (tmp_path / name / f"{index}.png").write_bytes(png(image))
    dataset = splits.load(f"folder:{tmp_path}", None, DataConfig())
    assert dataset.class_names == ["cat", "dog"]
    assert [len(split.labels) for split in dataset[:3]] == [14, 2, 4]
    (tmp_path / "dog" / "3.png").write_bytes(b"nothing")
    sources.read_source.cache_clear()
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        splits.load(f"folder:{tmp_path}", None, DataConfig())


def test_class_folders_with_parts_of_their_own(tmp_path):
    for part, count in (("train", 20), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                path = tmp_path / part / name / f"{index}.png"
                path.write_bytes(png(np.full((9, 9, 3), index, np.uint8)))
    dataset = splits.load(f"folder:{tmp_path}", None, DataConfig())
    assert [len(split.labels) for split in dataset[:3]] == [36, 4, 6]


def test_the_checksum_is_of_images_labels_and_parts():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    plain = sources.Split(images, torch.tensor([0, 1]))
    sums = {
        sources._checksum(plain, None),
        sources._checksum(plain._replace(labels=torch.tensor([0, 0])), None),
        sources._checksum(plain._replace(images=images + 1), None),
        sources._checksum(plain._replace(images=images.view(2, 3, 1, 4)), None),
        sources._checksum(plain, plain),
    }
    assert len(sums) == 5
    assert sources._checksum(plain, None) in sums


def folders(root, **counts):
    """Class folders of grey images: ``name=count``; image n has the grey value n."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(png(np.full((4, 4, 3), index, np.uint8)))


def test_class_folders_are_read_in_the_order_of_their_names(tmp_path):
    folders(tmp_path, dog=2, cat=3)
    folders(tmp_path, **{".hidden": 1})
    (tmp_path / "notes.txt").write_text("no class")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "2.png").rename(tmp_path / "cat" / "2.PNG")
    source = sources.read_source(f"folder:{tmp_path}", None)
    assert source.class_names == ["cat", "dog"]
    assert source.test is None
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.train.labels.dtype == torch.int64
    assert source.train.images.shape == (5, 3, 256, 256)
    assert source.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1]


def test_a_train_folder_alone_is_a_class(tmp_path):
    folders(tmp_path, train=2, other=1)
    source = sources.read_source(f"folder:{tmp_path}", None)
    assert (source.class_names, source.test) == (["other", "train"], None)


def test_class_folders_that_cannot_be_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        sources.read_source(f"folder:{tmp_path / 'none'}", None)
    folders(tmp_path, one=1)
    with pytest.raises(UserError, match=r"at least two class folders with images, and .* has 1"):
        sources.read_source(f"folder:{tmp_path}", None)
    folders(tmp_path, two=0)
    with pytest.raises(UserError, match="two holds no images"):
        sources.read_source(f"folder:{tmp_path}", None)


def test_parquet_files_are_read_in_order_and_classes_without_names_are_numbered(tmp_path, images):
    pixels, labels = images
    write_parquet(tmp_path / "cifar10", pixels[:10], labels[:10])
    first = tmp_path / "cifar10" / "train-00000-of-00001.parquet"
    first.rename(first.with_name("train-00001-of-00002.parquet"))
    write_parquet(tmp_path / "other", pixels[10:], labels[10:])
    (tmp_path / "other" / first.name).rename(tmp_path / "cifar10" / "train-00000-of-00002.parquet")
    source = sources.read_source("cifar10", tmp_path)
    assert source.train.labels.tolist() == labels[10:] + labels[:10]
    assert len(source.test.labels) == 10
    assert source.class_names == ["0", "1", "2", "3"]


def test_parquet_images_of_two_sizes_are_refused(tmp_path, images):
    write_parquet(tmp_path / "cifar10", [images[0][0], images[0][1][:16]], [0, 1])
    with pytest.raises(UserError, match="not all of one size"):
        sources.read_source("cifar10", tmp_path)


def test_a_train_file_without_its_test_is_no_data_set(tmp_path, images):
    write_parquet(tmp_path / "cifar10", *images)
    next((tmp_path / "cifar10").glob("test-*")).unlink()
    with pytest.raises(UserError, match="no cifar10 in it"):
        sources.read_source("cifar10", tmp_path)


def test_what_was_provided_comes_before_what_lies_there(monkeypatch):
    monkeypatch.setattr(sources, "_provided", {})
    found = sources.source_of("digits", None)
    assert found is sources.read_source("digits", None)  # read once
    other = found._replace(sha256="of another node")
    sources.provide("digits", other)
    assert sources.source_of("digits", None) is other


def test_digits_are_grey_values_of_sixteenths():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = sources.read_source("digits", None).train.images
    assert torch.equal(images[:, 0], images[:, 2])
    expected = np.rint(digits.images * 15.9375)
    assert np.array_equal(images[:, 1].numpy(), expected)
    labels = sources.read_source("digits", None).train.labels
    assert labels.tolist() == digits.target.tolist()


@pytest.mark.parametrize("asked", [None, "here"])
def test_cifar_is_downloaded_only_where_no_folder_was_given(tmp_path, monkeypatch, asked):
    calls = []
    monkeypatch.setattr(
        sources, "_torchvision_cifar", lambda *given, **more: calls.append((*given, more))
    )
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    sources._cifar("cifar10", tmp_path if asked else None)
    root = tmp_path / "cifar10" if asked else sources.DEFAULT_DATA_DIR
    assert calls == [("cifar10", root, {"download": asked is None})]


@pytest.mark.parametrize("download", [True, False])
def test_torchvision_is_asked_for_both_parts_and_each_stays_itself(monkeypatch, tmp_path, download):
    def reader(root, train, download):
        asked.append((root, train, download))
        data = np.full((3 if train else 2, 4, 5, 3), 7 if train else 9, np.uint8)
        data[..., 2] = 1
        labels = [2, 0, 1] if train else [1, 1]
        return SimpleNamespace(data=data, targets=labels, classes=("a", "b", "c"))

    asked = []
    monkeypatch.setattr(sources, "_torchvision_class", lambda dataset: reader)
    train, test, names = sources._torchvision_cifar("cifar10", tmp_path, download=download)
    assert asked == [(tmp_path, True, download), (tmp_path, False, download)]
    assert (train.labels.tolist(), test.labels.tolist()) == ([2, 0, 1], [1, 1])
    assert (train.images.shape, test.images.shape) == ((3, 3, 4, 5), (2, 3, 4, 5))
    assert [train.images[0, :, 0, 0].tolist(), test.images[0, :, 0, 0].tolist()] == [
        [7, 7, 1],
        [9, 9, 1],
    ]
    assert train.labels.dtype == torch.int64
    assert names == ["a", "b", "c"]
