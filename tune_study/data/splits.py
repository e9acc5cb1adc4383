"""A data set as a trial sees it: split by one rule."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tune_study.config import SPLIT_SEED, DataConfig
from tune_study.data.sources import Split, source_of
from tune_study.errors import UserError


class Dataset(NamedTuple):
    """A data set as a trial sees it."""

    train: Split
    val: Split
    test: Split
    class_names: list[str]
    sha256: str
    """Of all images and labels of the source, whatever files they came in."""


def load(dataset: str, data_dir: Path | None, sizes: DataConfig) -> Dataset:
    """The three splits of ``dataset``, the same for every trial with these ``sizes``.

    The images come from ``data_dir``, or from torchvision's download when it is ``None``.
    Raises ``UserError`` when they are missing, corrupt or fewer than asked for.
    """
    source = source_of(dataset, data_dir)
    everything, test = source.train, source.test
    if test is None:
        train_indices, test_indices = _split_off(everything.labels, None, 0.2, dataset, "test")
        everything, test = everything.take(train_indices), everything.take(test_indices)
    train_indices, val_indices = _split_off(everything.labels, sizes.val_size, 0.1, dataset, "val")
    train, val = everything.take(train_indices), everything.take(val_indices)
    train = _subset(train, sizes.train_size, dataset, "train")
    test = _subset(test, sizes.test_size, dataset, "test")
    return Dataset(train, val, test, source.class_names, source.sha256)


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


def _subset(split: Split, size: int | None, dataset: str, name: str) -> Split:
    if size is None or size == len(split.labels):
        return split
    if size > len(split.labels):
        raise UserError(
            f"data.{name}_size = {size}: {dataset} has {len(split.labels)} images for it; "
            "ask for fewer"
        )
    return split.take(_split_off(split.labels, size, 0, dataset, name)[1])
