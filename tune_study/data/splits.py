"""A data set as a trial sees it: split by one rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tune_study.config import SPLIT_SEED, DataConfig
from tune_study.data.listed import Listed
from tune_study.data.place import Place, Preprocessing
from tune_study.data.sources import Split, count, source_of
from tune_study.errors import UserError


class Outline(NamedTuple):
    """How much a trial sees: what can be told without its images."""

    classes: int
    train: int
    val: int
    test: int
    told: str = ""
    """Of a folder or table: what was found, passed over and split, in one line."""
    left_out: tuple[str, ...] = ()
    """Images of it that cannot be read, with the reason."""

    @property
    def is_known(self) -> bool:
        """Whether anything is: else it would have to be downloaded."""
        return self.train > 0


UNKNOWN = Outline(10, 0, 0, 0)
"""A model needs some number of classes to be looked at."""


class Dataset(NamedTuple):
    """A data set as a trial sees it."""

    train: Split
    val: Split
    test: Split
    class_names: list[str]
    sha256: str
    """Of all images and labels of the source, whatever files they came in; of a folder of its
    files, classes and parts."""
    told: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def outline(self) -> Outline:
        """How much there is."""
        train, val, test = (len(split.labels) for split in self[:3])
        return Outline(len(self.class_names), train, val, test, self.told, self.left_out)


def load(
    dataset: str, place: Place, sizes: DataConfig, how: Preprocessing | None = None
) -> Dataset:
    """The three splits of ``dataset``, the same for every trial with these ``sizes``.

    The images come from ``place.data_dir``, or from torchvision's download when it is ``None``;
    those of a folder or table from the cache, at the side that ``how`` wants, which other data sets
    need not be told. Raises ``UserError`` when they are missing, corrupt or fewer than asked for.
    """
    source = source_of(dataset, place, how, sizes.columns)
    rows = _rows({name: part.labels for name, part in source.parts.items()}, sizes, dataset)
    train, val, test = (
        source.parts[part].take(which) if len(which) < len(source.parts[part].labels)
        else source.parts[part]
        for part, which in rows
    )  # fmt: skip
    told = _told(dataset, rows, source.found, source.left_out)
    return Dataset(train, val, test, source.class_names, source.sha256, told, source.left_out)


def outline(
    dataset: str, place: Place, sizes: DataConfig, how: Preprocessing | None = None
) -> Outline:
    """What ``load`` would have, without a download and without writing anything.

    ``UNKNOWN`` for a data set of the hub's that is not on this machine, or that code has not drawn
    yet. Raises ``UserError`` as far as it can be told so.
    """
    if (counted := count(dataset, place, how, sizes.columns)) is None:
        return UNKNOWN
    rows = _rows(counted.labels, sizes, dataset)
    train, val, test = (len(which) for _, which in rows)
    told = _told(dataset, rows, counted.found, counted.left_out)
    return Outline(counted.classes, train, val, test, told, counted.left_out)


Rows = list[tuple[str, np.ndarray]]
"""Of the training, validation and test images: (the part that they are in, their places in it)."""


def _rows(labels: Mapping[str, Tensor], sizes: DataConfig, dataset: str) -> Rows:
    """``labels`` are those of the parts that are there. Raises ``UserError``."""
    places = {part: np.arange(len(some)) for part, some in labels.items()}
    source = {part: part if part in labels else "train" for part in ("train", "val", "test")}
    for part, size, share in (("test", None, 0.2), ("val", sizes.val_size, 0.1)):
        if part not in labels:
            rest = places["train"]
            kept, off = _split_off(labels["train"][rest], size, share, dataset, part)
            places["train"], places[part] = rest[kept], rest[off]
    wanted = {"train": sizes.train_size, "test": sizes.test_size}
    if "val" in labels:
        wanted["val"] = sizes.val_size
    for part, size in wanted.items():
        some = labels[source[part]][places[part]]
        places[part] = places[part][_subset(some, size, dataset, part)]
    return [(source[part], places[part]) for part in ("train", "val", "test")]


def _told(dataset: str, rows: Rows, found: Listed | None, left_out: tuple[str, ...]) -> str:
    """The line of a folder or table; nothing of another data set."""
    if found is None:
        return ""
    uses = ("to train on", "for validation", "for the test")
    words = []
    for part, use, (source, which) in zip(("train", "val", "test"), uses, rows, strict=True):
        words.append(f"{len(which)} {use}{'' if source == part else ' (split off train)'}")
    lines = [
        f"{len(found.paths)} images of {len(found.class_names)} classes",
        ", ".join(words),
        *found.told(),
    ]
    if left_out:
        lines.append(f"left out, for they cannot be read: {len(left_out)}")
    return f"{dataset}: {'; '.join(lines)}"


def _split_off(
    labels: Tensor, size: int | None, share: float, dataset: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of (the rest, ``size`` images), stratified by class, by the fixed seed."""
    from sklearn.model_selection import train_test_split

    wanted = size if size is not None else max(round(len(labels) * share), len(labels.unique()))
    try:
        rest, chosen = train_test_split(
            np.arange(len(labels)),
            test_size=wanted,
            stratify=labels.numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise UserError(
            f"data.{name}_size = {wanted}: cannot be taken from the {len(labels)} images of "
            f"{dataset} with its {len(labels.unique())} classes in proportion ({error})"
        ) from None
    return np.sort(rest), np.sort(chosen)


def _subset(labels: Tensor, size: int | None, dataset: str, name: str) -> np.ndarray:
    """Sorted places of ``size`` of them, all for ``None``. Raises ``UserError``."""
    if size is None or size == len(labels):
        return np.arange(len(labels))
    if size > len(labels):
        raise UserError(
            f"data.{name}_size = {size}: {dataset} has {len(labels)} images for it; ask for fewer"
        )
    return _split_off(labels, size, 0, dataset, name)[1]
