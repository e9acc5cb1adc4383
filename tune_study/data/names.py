"""One folder of images has one name in a study, however it is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

FOLDER = "folder:"


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
            return dataset
        return self._of.setdefault(_resolved(place), f"{FOLDER}{_written_short(place)}")


def place_of(dataset: str) -> Path | None:
    """The folder that ``folder:PATH`` names, ``~`` being the home; ``None`` for other data sets."""
    path = dataset.removeprefix(FOLDER)
    return None if path in (dataset, "") else Path(os.path.expanduser(path))


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
