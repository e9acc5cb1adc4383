import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import datasets

from tune_study.data import sources
from tune_study.data.place import Place
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
    source = sources.read_source("cifar10", Place(tmp_path))
    assert source.class_names == ["a", "b", "c", "d"]
    expected = torch.as_tensor(images[0]).permute(0, 3, 1, 2)
    assert torch.equal(source.train.images, expected)
    assert source.train.labels.tolist() == images[1]


def test_cifar100_uses_fine_labels(tmp_path, images):
    write_parquet(tmp_path / "cifar100", *images, column="fine_label")
    assert sources.read_source("cifar100", Place(tmp_path)).train.labels.tolist() == images[1]
    with pytest.raises(UserError, match="no cifar10 in it"):
        sources.read_source("cifar10", Place(tmp_path / "cifar100"))


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
    from_torchvision = sources.read_source("cifar10", Place(tmp_path / "tv"))
    from_parquet = sources.read_source("cifar10", Place(tmp_path / "hf"))
    assert from_torchvision.sha256 == from_parquet.sha256
    assert from_torchvision.class_names == from_parquet.class_names

    sources.read_source.cache_clear()
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # would run a command
    with pytest.raises(UserError, match="not found or corrupted"):
        sources.read_source("cifar10", Place(tmp_path / "tv"))


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
        sources.read_source("cifar10", Place(tmp_path))


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="--data-dir"):
            sources.read_source("cifar10", Place(folder))


def test_no_network_names_the_remedy(tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="--data-dir"):
        sources.read_source("cifar10", Place(cache_dir=tmp_path))


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


def test_parquet_files_are_read_in_order_and_classes_without_names_are_numbered(tmp_path, images):
    pixels, labels = images
    write_parquet(tmp_path / "cifar10", pixels[:10], labels[:10])
    first = tmp_path / "cifar10" / "train-00000-of-00001.parquet"
    first.rename(first.with_name("train-00001-of-00002.parquet"))
    write_parquet(tmp_path / "other", pixels[10:], labels[10:])
    (tmp_path / "other" / first.name).rename(tmp_path / "cifar10" / "train-00000-of-00002.parquet")
    source = sources.read_source("cifar10", Place(tmp_path))
    assert source.train.labels.tolist() == labels[10:] + labels[:10]
    assert len(source.test.labels) == 10
    assert source.class_names == ["0", "1", "2", "3"]


def test_parquet_images_of_two_sizes_are_refused(tmp_path, images):
    write_parquet(tmp_path / "cifar10", [images[0][0], images[0][1][:16]], [0, 1])
    with pytest.raises(UserError, match="not all of one size"):
        sources.read_source("cifar10", Place(tmp_path))


def test_a_train_file_without_its_test_is_no_data_set(tmp_path, images):
    write_parquet(tmp_path / "cifar10", *images)
    next((tmp_path / "cifar10").glob("test-*")).unlink()
    with pytest.raises(UserError, match="no cifar10 in it"):
        sources.read_source("cifar10", Place(tmp_path))


def test_what_was_provided_comes_before_what_lies_there(monkeypatch):
    monkeypatch.setattr(sources, "_provided", {})
    found = sources.source_of("digits", Place())
    assert found is sources.read_source("digits", Place())  # read once
    other = found._replace(sha256="of another node")
    sources.provide("digits", None, other)
    assert sources.source_of("digits", Place()) is other


def test_digits_are_grey_values_of_sixteenths():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = sources.read_source("digits", Place()).train.images
    assert torch.equal(images[:, 0], images[:, 2])
    expected = np.rint(digits.images * 15.9375)
    assert np.array_equal(images[:, 1].numpy(), expected)
    labels = sources.read_source("digits", Place()).train.labels
    assert labels.tolist() == digits.target.tolist()


@pytest.mark.parametrize("asked", [None, "here"])
def test_cifar_is_downloaded_only_where_no_folder_was_given(tmp_path, monkeypatch, asked):
    calls = []
    monkeypatch.setattr(
        sources, "_torchvision_cifar", lambda *given, **more: calls.append((*given, more))
    )
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    sources._cifar("cifar10", Place(tmp_path if asked else None, tmp_path / "cache"))
    root = tmp_path / "cifar10" if asked else tmp_path / "cache" / "data"
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


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache-dir: .*file/data cannot be written"):
        sources.read_source("cifar10", Place(cache_dir=tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Place().cache() == tmp_path / ".cache" / "tune-study"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert Place().cache() == Path("/x/tune-study")
    assert Place(cache_dir=tmp_path).cache() == tmp_path


def test_what_is_known_of_digits_is_what_they_have():
    known = sources.count("digits", Place(), None)
    assert known.classes == 10
    assert torch.equal(known.labels["train"], sources.read_source("digits", Place()).train.labels)
