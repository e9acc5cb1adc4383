"""One folder of images has one name in a study, however it is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tune_study.config import CODE
from tune_study.folder.remote import is_uri

FOLDER = "folder:"
HUB = "hf:"
DECODED = (FOLDER, HUB, CODE)
"""How data sets begin whose images are decoded into the cache."""


class Hub(NamedTuple):
    """What ``hf:`` names: a folder, or a repository of the Hugging Face hub."""

    folder: Path | None
    repository: str
    """As it is written, without the configuration; of a folder, too."""
    configuration: str | None


def is_bucket(dataset: str) -> bool:
    """Whether the folder lies behind a URI: ``folder:s3://bucket/images``."""
    return dataset.startswith(FOLDER) and is_uri(dataset.removeprefix(FOLDER))


class Names:
    """What data sets are called. A folder that the study has under a name keeps it."""

    def __init__(self, known: Iterable[str] = (), places: Mapping[str, Path] | None = None) -> None:
        """``known`` are the study's own names; ``places`` says where some of them lie."""
        self._of: dict[tuple[Path, str, str], str] = {}
        for name in known:
            if (place := (places or {}).get(name) or place_of(name)) is not None:
                self._of.setdefault(_key(name, place), name)

    def of(self, dataset: str) -> str:
        """The name of ``dataset``: that of the same folder, else the shortest writing of it."""
        if (place := place_of(dataset)) is None:
            return dataset.rstrip("/") if is_bucket(dataset) else dataset
        return self._of.setdefault(_key(dataset, place), _written_short(dataset, place))


def place_of(dataset: str) -> Path | None:
    """The folder that ``folder:PATH`` or ``hf:./PATH`` names, ``~`` being the home.

    ``None`` for other data sets, and for a URI, which is a name already.
    """
    if dataset.startswith(HUB):
        return hub_of(dataset).folder
    path = dataset.removeprefix(FOLDER)
    if path in (dataset, "") or is_bucket(dataset):
        return None
    return Path(os.path.expanduser(path))


def hub_of(dataset: str) -> Hub:
    """``hf:NAME``, ``hf:NAME@CONFIGURATION``, or a path that begins with ``.``, ``/`` or ``~``.

    An ``@`` belongs to the path where there is such a folder.
    """
    text = dataset.removeprefix(HUB)
    is_path = text.startswith((".", "/", "~"))
    name, at, configuration = text.rpartition("@")
    if not at or (is_path and Path(os.path.expanduser(text)).is_dir()):
        name, configuration = text, ""
    folder = Path(os.path.expanduser(name)) if is_path else None
    return Hub(folder, name, configuration or None)


def _key(dataset: str, place: Path) -> tuple[Path, str, str]:
    if dataset.startswith(HUB):
        return _resolved(place), HUB, hub_of(dataset).configuration or ""
    return _resolved(place), FOLDER, ""


def _written_short(dataset: str, place: Path) -> str:
    """Without ``a/../``, unless a link makes that another folder."""
    short = Path(os.path.normpath(place))
    path = str(short if _resolved(short) == _resolved(place) else place)
    if not dataset.startswith(HUB):
        return FOLDER + path
    configuration = hub_of(dataset).configuration
    begun = path if path.startswith((".", "/")) else f"./{path}"  # else it is a name of the hub's
    return HUB + begun + (f"@{configuration}" if configuration else "")


def _resolved(place: Path) -> Path:
    """A name that no folder can have stands for itself: it is refused where it is read."""
    try:
        return place.resolve()
    except (OSError, RuntimeError, ValueError):
        return place
