"""What is known of images before they are read: part, class and place of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from tune_study.data.decoding import File


class Images(NamedTuple):
    """The images of one part, in the order of the classes, then of their folders and names.

    Those of a table are in the order of its rows.
    """

    paths: list[str]
    """Or ``train[17]``, a row."""
    labels: np.ndarray
    """int64 [N], places in ``class_names``."""


def rows_of(split: str, labels: np.ndarray) -> Images:
    """The rows of a table's split, whose labels these are."""
    return Images([f"{split}[{row}]" for row in range(len(labels))], labels)


class InParts:
    """Images by part; those of a table's rows are told as they are called."""

    parts: Mapping[str, Images]

    @property
    def paths(self) -> list[str]:
        return [path for part in self.parts.values() for path in part.paths]

    def shown(self, path: str) -> str:
        return path


class Listed(Protocol):
    """Images that lie somewhere: of a folder (``Found``), in a table's rows (``Rows``), or drawn by
    code (``Drawn``).
    """

    @property
    def dataset(self) -> str:
        """Its name."""

    @property
    def class_names(self) -> list[str]: ...

    @property
    def parts(self) -> Mapping[str, Images]:
        """``train``, and ``val`` and ``test`` where they are set apart."""

    @property
    def paths(self) -> list[str]:
        """Of all parts, in their order."""

    @property
    def key(self) -> bytes:
        """What a record of it goes by."""

    def shown(self, path: str) -> str:
        """One of ``paths`` as it is told to the user."""

    def told(self) -> list[str]:
        """What else was found, in words."""

    def stamp(self) -> tuple[str, int]:
        """(a digest that changes when it is touched, when that was: ns since 1970)."""

    def files(self) -> Iterator[tuple[File, str]]:
        """All images in the order of ``paths``; where ``shown`` does not name it, also the file."""
