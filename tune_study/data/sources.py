"""Images as uint8: digits and CIFAR in a tensor, folders and tables in a mapped file."""

from __future__ import annotations

import functools
import hashlib
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tune_study.config import CODE, Columns
from tune_study.data import cache, drawn, hub
from tune_study.data.buckets import folder_of
from tune_study.data.decoding import Unreadable, rgb
from tune_study.data.folders import find
from tune_study.data.listed import Listed
from tune_study.data.mapped import Mapped
from tune_study.data.names import DECODED, HUB, is_bucket
from tune_study.data.place import Place, Preprocessing
from tune_study.errors import UserError, first_line

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
CIFAR_IMAGES = {"train": 50_000, "test": 10_000}
"""Of either set, as many of each class."""
LOOKED_THROUGH = 2000
"""Images of a folder that are opened where nothing is to be written; those of more are counted."""


class Split(NamedTuple):
    """``images`` uint8 [N, 3, H, W]; ``labels`` int64 [N]."""

    images: Tensor | Mapped
    labels: Tensor

    def take(self, indices: np.ndarray) -> Split:
        index = torch.as_tensor(indices)
        images = self.images
        taken = images.take(index) if isinstance(images, Mapped) else images[index]
        return Split(taken, self.labels[index])

    def to(self, device: torch.device) -> Split:
        """Labels go to the device; so do images, but where they stay in a file for their size."""
        return Split(self.images.to(device), self.labels.to(device))


class Source(NamedTuple):
    """A data set as it lies on the disk. ``test`` and ``val`` are ``None`` where not set apart."""

    train: Split
    test: Split | None
    class_names: list[str]
    sha256: str
    val: Split | None = None
    found: Listed | None = None
    """Of a folder or a table."""
    left_out: tuple[str, ...] = ()
    """Images of it that cannot be read, with the reason."""

    @property
    def parts(self) -> dict[str, Split]:
        """``train``, and ``val`` and ``test`` where they are set apart."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}


class Counted(NamedTuple):
    """A data set of which the labels are known, and perhaps not one image is here."""

    labels: dict[str, Tensor]
    """By part, as ``Source.parts``."""
    classes: int
    found: Listed | None = None
    left_out: tuple[str, ...] = ()


_provided: dict[str, Source] = {}


ANY = Columns()


def key_of(dataset: str, how: Preprocessing | None, columns: Columns = ANY) -> str:
    """Names what is read: of a folder or table its images at one side, of another data set all."""
    if not dataset.startswith(DECODED):
        return dataset
    assert how is not None
    return f"{dataset} {how.image_size} {how.interpolation} {columns}"


def provide(
    dataset: str, how: Preprocessing | None, source: Source, columns: Columns = ANY
) -> None:
    """From now on this process takes the data set from ``source``: it came from another node."""
    _provided[key_of(dataset, how, columns)] = source


def source_of(
    dataset: str, place: Place, how: Preprocessing | None = None, columns: Columns = ANY
) -> Source:
    """What was provided, else what ``read_source`` finds. Raises ``UserError`` as ``load``."""
    if given := _provided.get(key_of(dataset, how, columns)):
        return given
    wanted = (how, columns) if dataset.startswith(DECODED) else ()  # others are kept once
    return read_source(dataset, place, *wanted)


@functools.lru_cache(maxsize=4)
def read_source(
    dataset: str, place: Place, how: Preprocessing | None = None, columns: Columns = ANY
) -> Source:
    """All images of ``dataset``. Kept for the next trial of the process; never changed.

    Those of a folder or table as ``how`` wants them, the others as they come. Raises ``UserError``
    as ``load``.
    """
    if dataset.startswith(DECODED):
        assert how is not None
        with _listed(dataset, place, columns) as found:
            assert found is not None
            return _decoded(found, place, how)
    if dataset == "digits":
        train, test, class_names = _digits()
    else:
        train, test, class_names = _cifar(dataset, place)
    return Source(train, test, class_names, _checksum(train, test))


@contextmanager
def _listed(
    dataset: str, place: Place, columns: Columns, *, dry: bool = False
) -> Iterator[Listed | None]:
    """Its images. A ``dry`` look fetches and draws none: ``None`` where they are not here."""
    if dataset.startswith(CODE):
        yield drawn.find(dataset, place, dry=dry)
        return
    if dataset.startswith(HUB):
        yield hub.find(dataset, columns, place, dry=dry)
        return
    with folder_of(dataset, place, names_only=dry) as root:
        yield find(root)


def count(
    dataset: str, place: Place, how: Preprocessing | None, columns: Columns = ANY
) -> Counted | None:
    """What can be told without a download, and without writing anything.

    ``None`` for a data set of the hub's that is not on this machine, or that code has not drawn
    yet. Raises ``UserError`` for what is no data set, or not a large one with broken images.
    """
    if dataset == "digits":
        source = read_source(dataset, place)
        return Counted({"train": source.train.labels}, len(source.class_names))
    if dataset in CIFAR_CLASSES:
        classes = CIFAR_CLASSES[dataset]
        labels = {part: torch.arange(size) % classes for part, size in CIFAR_IMAGES.items()}
        return Counted(labels, classes)
    assert how is not None
    with _listed(dataset, place, columns, dry=True) as found:
        if found is None:
            return None
        broken: dict[int, str] = {}
        if len(found.paths) <= LOOKED_THROUGH and not is_bucket(dataset):
            broken = cache.look_through(found, how)
        cache.refuse_broken(found, broken, place)
        labels = {part: labels for part, (_, labels) in _used(found, broken).items()}
    return Counted(labels, len(found.class_names), found, tuple(cache.named(found, broken)))


def _checksum(*splits: Split | None) -> str:
    digest = hashlib.sha256()
    for split in splits:
        if split is not None:
            digest.update(str(tuple(split.images.shape)).encode())
            assert isinstance(split.images, Tensor)
            digest.update(split.images.contiguous().numpy().data)
            digest.update(split.labels.numpy().data)
    return digest.hexdigest()


def _digits() -> tuple[Split, None, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey values 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.as_tensor(np.round(digits.images * (255 / 16)).astype(np.uint8))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    return Split(images, labels), None, [str(name) for name in digits.target_names]


def _cifar(dataset: str, place: Place) -> tuple[Split, Split, list[str]]:
    """From Hugging Face parquet, else from torchvision's folder, else by its download."""
    data_dir = place.data_dir
    if data_dir is None:
        return _torchvision_cifar(dataset, place.cache() / "data", download=True)
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: there is no such folder")
    for folder in (data_dir / dataset, *sorted((data_dir / dataset).glob("*/")), data_dir):
        if files := _parquet_files(folder, dataset):
            return _parquet_cifar(dataset, files)
    for folder in (data_dir, data_dir / dataset):
        if (folder / _torchvision_class(dataset).base_folder).is_dir():
            return _torchvision_cifar(dataset, folder, download=False)
    raise UserError(
        f"--data-dir {data_dir}: no {dataset} in it; it needs {dataset}/train-*.parquet and "
        f"{dataset}/test-*.parquet, or {_torchvision_class(dataset).base_folder}/; "
        "without --data-dir it is downloaded"
    )


def _torchvision_class(dataset: str):
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]


def _torchvision_cifar(
    dataset: str, root: Path, *, download: bool
) -> tuple[Split, Split, list[str]]:
    """torchvision checks the official md5 sums before it unpickles anything."""
    reader = _torchvision_class(dataset)
    try:
        train, test = (reader(root, train=part, download=download) for part in (True, False))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"dataset {dataset}: the download failed ({error}); connect to the network once, or "
            "give --data-dir with a folder in torchvision's or the Hugging Face parquet layout"
        ) from None
    except OSError as error:
        raise UserError(
            f"--cache-dir: {root} cannot be written ({error.strerror}); name another folder"
        ) from None
    except RuntimeError as error:
        said = first_line(error).rstrip(".")
        raise UserError(f"{dataset} in {root}: {said}; fetch the files again") from None
    splits = [
        Split(
            torch.as_tensor(np.asarray(part.data)).permute(0, 3, 1, 2).contiguous(),
            torch.as_tensor(part.targets, dtype=torch.int64),
        )
        for part in (train, test)
    ]
    return splits[0], splits[1], list(train.classes)


def _label_column(dataset: str) -> str:
    return "fine_label" if dataset == "cifar100" else "label"


def _parquet_files(folder: Path, dataset: str) -> dict[str, list[Path]] | None:
    """{"train": [...], "test": [...]} where both are there and hold this data set's labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test")}
    if not all(files.values()):
        return None
    try:
        columns = pq.read_schema(files["train"][0]).names
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(files["train"][0], error) from None
    return files if _label_column(dataset) in columns else None


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read ({first_line(error)}); replace the file by a whole copy"
    )


def _parquet_cifar(dataset: str, files: dict[str, list[Path]]) -> tuple[Split, Split, list[str]]:
    train, test = (_read_parquet(paths, _label_column(dataset)) for paths in files.values())
    names = _parquet_class_names(files["train"][0], _label_column(dataset))
    num_classes = int(train.labels.max()) + 1
    return train, test, names or [str(label) for label in range(num_classes)]


def _read_parquet(paths: list[Path], label_column: str) -> Split:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = [], []
    for path in paths:
        try:
            table = pq.read_table(path, columns=["img", label_column])
            images += [rgb(row["bytes"]) for row in table["img"].to_pylist()]
        except (pa.ArrowException, OSError, KeyError, Unreadable) as error:
            raise _corrupt(path, error) from None
        labels.append(table[label_column].to_numpy())
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{paths[0]}: its images are not all of one size")
    stacked = torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, torch.as_tensor(np.concatenate(labels), dtype=torch.int64))


def _parquet_class_names(path: Path, label_column: str) -> list[str] | None:
    """From the schema metadata that the Hugging Face ``datasets`` library writes."""
    import json

    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    if b"huggingface" not in metadata:
        return None
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    return features[label_column].get("names")


def _decoded(found: Listed, place: Place, how: Preprocessing) -> Source:
    """Decoded into the cache where they are not yet."""
    pixels = cache.pixels(found, how, place)
    broken = pixels.broken
    cache.refuse_broken(found, broken, place)
    images = Mapped(pixels.path, pixels.shape)
    parts: dict[str, Split] = {}
    for part, (rows, labels) in _used(found, broken).items():
        parts[part] = Split(images.take(rows), labels)
    return Source(
        parts["train"],
        parts.get("test"),
        list(found.class_names),
        cache.identity(found, pixels.contents, broken),
        parts.get("val"),
        found,
        tuple(cache.named(found, broken)),
    )


def _used(found: Listed, broken: dict[int, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """{part: (places among all images, labels)} of the images that can be read.

    Raises ``UserError`` where a class has none to train on.
    """
    used, start = {}, 0
    for part, images in found.parts.items():
        rows = torch.arange(start, start + len(images.paths))
        whole = torch.tensor([row not in broken for row in rows.tolist()])
        used[part] = rows[whole], torch.as_tensor(images.labels, dtype=torch.int64)[whole]
        start += len(images.paths)
    if missing := set(range(len(found.class_names))) - set(used["train"][1].tolist()):
        name = found.class_names[min(missing)]
        raise UserError(
            f"dataset {found.dataset}: no training image of class {name} can be read; replace "
            "the files by whole ones, or take the class away"
        )
    return used
