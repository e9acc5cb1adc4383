"""Images, read once into one uint8 tensor: digits, CIFAR, class folders."""

from __future__ import annotations

import functools
import hashlib
import io
import urllib.error
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tune_study.errors import UserError, first_line

DEFAULT_DATA_DIR = Path("~/.cache/tune-study/data").expanduser()
FOLDER_SIDE = 256
"""Class-folder images are held at this side: the shorter side resized, the centre cropped."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class Split(NamedTuple):
    """``images`` uint8 [N, 3, H, W]; ``labels`` int64 [N]."""

    images: Tensor
    labels: Tensor

    def take(self, indices: np.ndarray) -> Split:
        index = torch.as_tensor(indices)
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Source(NamedTuple):
    """A data set as it lies on the disk. ``test`` is ``None`` where none is set apart."""

    train: Split
    test: Split | None
    class_names: list[str]
    sha256: str


_provided: dict[str, Source] = {}


def provide(dataset: str, source: Source) -> None:
    """From now on this process takes the data set from memory: it came from another node."""
    _provided[dataset] = source


def source_of(dataset: str, data_dir: Path | None) -> Source:
    """What was provided, else what ``read_source`` finds. Raises ``UserError`` as ``load``."""
    return _provided.get(dataset) or read_source(dataset, data_dir)


@functools.lru_cache(maxsize=4)
def read_source(dataset: str, data_dir: Path | None) -> Source:
    """All images of ``dataset``. Kept for the next trial of the process; never changed.

    Raises ``UserError`` as ``load``.
    """
    if dataset == "digits":
        train, test, class_names = _digits()
    elif dataset.startswith("folder:"):
        train, test, class_names = _class_folders(Path(dataset.removeprefix("folder:")))
    else:
        train, test, class_names = _cifar(dataset, data_dir)
    return Source(train, test, class_names, _checksum(train, test))


def _checksum(*splits: Split | None) -> str:
    digest = hashlib.sha256()
    for split in splits:
        if split is not None:
            digest.update(str(tuple(split.images.shape)).encode())
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


def _cifar(dataset: str, data_dir: Path | None) -> tuple[Split, Split, list[str]]:
    """From Hugging Face parquet, else from torchvision's folder, else by its download."""
    if data_dir is None:
        return _torchvision_cifar(dataset, DEFAULT_DATA_DIR, download=True)
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
            images += [
                np.asarray(_decode(row["bytes"]), np.uint8) for row in table["img"].to_pylist()
            ]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise _corrupt(path, error) from None
        labels.append(table[label_column].to_numpy())
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{paths[0]}: its images are not all of one size")
    stacked = torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, torch.as_tensor(np.concatenate(labels), dtype=torch.int64))


def _decode(encoded: bytes):
    """A PIL image in RGB. Raises ``OSError`` for bytes that are not a whole image."""
    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _parquet_class_names(path: Path, label_column: str) -> list[str] | None:
    """From the schema metadata that the Hugging Face ``datasets`` library writes."""
    import json

    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    if b"huggingface" not in metadata:
        return None
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    return features[label_column].get("names")


def _class_folders(root: Path) -> tuple[Split, Split | None, list[str]]:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/CLASS/*`` to be split."""
    if not root.is_dir():
        raise UserError(f"dataset folder:{root}: there is no such folder")
    has_parts = (root / "train").is_dir() and (root / "test").is_dir()
    train_root = root / "train" if has_parts else root
    class_names = sorted(
        path.name for path in train_root.iterdir() if path.is_dir() and path.name[0] != "."
    )
    if len(class_names) < 2:
        raise UserError(
            f"dataset folder:{root}: it needs at least two class folders with images, "
            f"and {train_root} has {len(class_names)}"
        )
    train = _read_class_folders(train_root, class_names)
    return (
        train,
        _read_class_folders(root / "test", class_names) if has_parts else None,
        class_names,
    )


def _read_class_folders(root: Path, class_names: list[str]) -> Split:
    from PIL import Image, ImageOps

    images, labels = [], []
    for label, name in enumerate(class_names):
        paths = sorted(p for p in (root / name).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise UserError(f"dataset folder: {root / name} holds no images")
        for path in paths:
            try:
                with Image.open(path) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), (FOLDER_SIDE, FOLDER_SIDE))
            except OSError as error:
                raise _corrupt(path, error) from None
            images.append(np.asarray(fitted, np.uint8))
            labels.append(label)
    stacked = torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, torch.as_tensor(labels, dtype=torch.int64))
