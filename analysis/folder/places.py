"""A study behind a URI, such as ``s3://bucket/path/demo``: fetched, read, its report put back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from analysis.folder.contents import StudyError
from tune_study.folder import remote
from tune_study.folder.remote import RemoteError

_LEFT_THERE = ("checkpoints", "adapter", "tensorboard", "report")
"""What no analysis reads."""


@contextmanager
def near(study: str) -> Iterator[Path]:
    """The folder of ``study``; one behind a URI is fetched into a temporary folder.

    Raises ``StudyError`` when it can't be.
    """
    if not remote.is_uri(study):
        yield Path(study)
        return
    with tempfile.TemporaryDirectory(prefix="tune-study-") as temporary:
        folder = Path(temporary) / (PurePosixPath(study.partition("?")[0]).name or "study")
        folder.mkdir()
        fetch(study, folder)
        yield folder


def fetch(uri: str, folder: Path) -> None:
    """All that the analysis reads. Raises ``StudyError``."""
    try:
        place = remote.open_remote(uri)
        names = [
            name
            for name in remote.listing(place)
            if remote.travels(name) and not set(PurePosixPath(name).parts) & set(_LEFT_THERE)
        ]
        # Tables that are older than a trial are not used: they come last.
        remote.fetch(place, folder, [name for name in names if "/" in name])
        remote.fetch(place, folder, [name for name in names if "/" not in name])
    except RemoteError as error:
        raise StudyError(f"study {error}") from None


def put_back(uri: str, folder: Path) -> None:
    """The report and its JSON files. Raises ``StudyError``."""
    files = [path for path in (folder / "report").rglob("*") if path.is_file()]
    files += folder.glob("quantization_*.json")
    try:
        place = remote.open_remote(uri)
        for path in files:
            remote.write(place, path.relative_to(folder).as_posix(), path.read_bytes())
    except RemoteError as error:
        raise StudyError(
            f"the report can't be put back: study {error}; --to FOLDER writes it here"
        ) from None
