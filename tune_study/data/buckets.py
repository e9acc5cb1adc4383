"""Images behind a URI, ``folder:s3://bucket/images``: mirrored into the cache, file by file.

Every machine that needs them fetches them itself, many files at a time. What is there already, of
the same size and time, is not fetched again: a fetch that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tune_study.data import cache
from tune_study.data.decoding import suffixes
from tune_study.data.names import FOLDER, is_bucket
from tune_study.data.place import Place
from tune_study.errors import UserError
from tune_study.folder import remote
from tune_study.folder.remote import Dated, Remote, RemoteError, masked

AT_A_TIME = 32
"""Files: a store takes long to answer, and answers many at once."""


@contextmanager
def folder_of(dataset: str, place: Place, *, names_only: bool = False) -> Iterator[Path]:
    """The folder of ``folder:PATH``; of a URI its mirror, which sentences call by the URI.

    With ``names_only`` the files of a URI are empty, and nothing is kept. Raises ``UserError`` for
    a URI that cannot be used, and where the mirror has no room.
    """
    where = dataset.removeprefix(FOLDER)
    if not is_bucket(dataset):
        yield Path(where)
        return
    if masked(where) != where:
        raise UserError(
            f"dataset folder:{masked(where)}: study.json would keep what is secret in it; leave it "
            "to the environment"
        )
    with tempfile.TemporaryDirectory() as empty:
        folder = Path(empty) / "images" if names_only else _mirror_of(where, place)
        try:
            _mirror(remote.open_remote(where), folder, names_only=names_only)
        except RemoteError as error:
            raise UserError(f"dataset folder:{error}") from None
        try:
            yield folder
        except UserError as error:
            raise UserError(str(error).replace(str(folder), where)) from None


def _mirror_of(uri: str, place: Place) -> Path:
    return place.cache() / "fetched" / hashlib.sha256(uri.encode()).hexdigest()[: cache.DIGITS]


def _mirror(there: Remote, folder: Path, *, names_only: bool) -> None:
    """Of what is no image the name alone, which is told as passed over."""
    wanted = {
        name: dated if _is_image(name) and not names_only else Dated(0, dated.mtime_ns)
        for name, dated in remote.dated(there).items()
    }
    if not wanted:
        raise UserError(
            f"dataset folder:{there.uri}: there are no files; write it as the store knows it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with cache.alone(folder):
            _fetch(there, folder, wanted)
    except OSError as error:
        raise UserError(
            f"--cache-dir: {error.filename or folder} cannot be written ({error.strerror}); name "
            "another folder"
        ) from None


def _fetch(there: Remote, folder: Path, wanted: Mapping[str, Dated]) -> None:
    here = dict(_files(folder))
    for name in here.keys() - wanted.keys():
        (folder / name).unlink()
    missing = sorted(name for name, dated in wanted.items() if here.get(name) != dated)
    needed = sum(wanted[name].size for name in missing)
    cache.refuse_no_room(folder, needed, f"{len(missing):,} files of {there.uri}")

    def fetch(name: str) -> None:
        if ".." in PurePosixPath(name).parts:
            raise UserError(f"dataset folder:{there.uri}: {name!r} is no name of a file here")
        dated = wanted[name]
        content = remote.read(there, name) if dated.size else b""
        if content is None or len(content) != dated.size:
            raise UserError(
                f"dataset folder:{there.uri}: {name} changed while it was fetched; give the same "
                "command again, when no one writes there"
            )
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        os.utime(temporary, ns=(dated.mtime_ns, dated.mtime_ns))
        os.replace(temporary, path)

    _each(missing, f"fetching the files of {there.uri}", fetch)


def _each(names: Sequence[str], title: str, do: Callable[[str], None]) -> None:
    """``do(name)`` for all, with a bar where a terminal shows it."""
    pool = ThreadPoolExecutor(AT_A_TIME, "files")
    with cache.progress(title, len(names), shown=True) as advance:
        try:
            for _ in pool.map(do, names):
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _files(folder: Path) -> Iterator[tuple[str, Dated]]:
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            yield path.relative_to(folder).as_posix(), Dated(status.st_size, status.st_mtime_ns)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in suffixes()
