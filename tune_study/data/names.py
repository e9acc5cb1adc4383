"""One folder of images has one name in a study, however it is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from tune_study.folder.remote import is_uri

FOLDER = "folder:"


def is_bucket(dataset: str) -> bool:
    """Whether the folder lies behind a URI: ``folder:s3://bucket/images``."""
    return dataset.startswith(FOLDER) and is_uri(dataset.removeprefix(FOLDER))


class Names:
    """What data sets are called. A folder that the study has under a name keeps it."""

    def __init__(self, known: Iterable[str] = (), places: Mapping[str, Path] | None = None) -> None:
        """``known`` are the study's own names; ``places`` says where some of them lie."""
        self._of: dict[Path, str] = {}
        for name in known:
            if (place := (places or {}).get(name) or place_of(name)) is not None:
                self._of.setdefault(_resolved(place), name)

    def of(self, dataset: str) -> str:
        """The name of ``dataset``: that of the same folder, else the shortest writing of it."""
        if (place := place_of(dataset)) is None:
            return dataset.rstrip("/") if is_bucket(dataset) else dataset
        return self._of.setdefault(_resolved(place), f"{FOLDER}{_written_short(place)}")


def place_of(dataset: str) -> Path | None:
    """The folder that ``folder:PATH`` names, ``~`` being the home.

    ``None`` for other data sets, and for a URI, which is a name already.
    """
    path = dataset.removeprefix(FOLDER)
    if path in (dataset, "") or is_bucket(dataset):
        return None
    return Path(os.path.expanduser(path))


def _written_short(place: Path) -> Path:
    """Without ``a/../``, unless a link makes that another folder."""
    short = Path(os.path.normpath(place))
    return short if _resolved(short) == _resolved(place) else place


def _resolved(place: Path) -> Path:
    """A name that no folder can have stands for itself: it is refused where it is read."""
    try:
        return place.resolve()
    except (OSError, RuntimeError, ValueError):
        return place
