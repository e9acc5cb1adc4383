"""A folder behind a URI: S3, Google, Azure, HDFS or a mounted disk, whatever pyarrow reaches.

Standard library and pyarrow only: ``analysis`` uses it too. Secrets can stand in a URI, so every
sentence here names it ``masked``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tune_study.folder.files import write_whole

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

T = TypeVar("T")
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further attempt: a network that is away for half a minute loses nothing."""
_AT_A_TIME = 8
_PUT_WHOLE = ("s3", "gcs", "abfs")
"""Object stores: an object appears when it is complete. Elsewhere a rename does it."""


class RemoteError(ValueError):
    """The URI can't be used, or no longer: one sentence that names it, masked."""


class Remote(NamedTuple):
    """An open folder. ``root`` is the path in ``filesystem``, without a slash at its end."""

    filesystem: FileSystem
    root: str
    uri: str
    """As in the command; it can hold secrets."""

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


def is_uri(text: str) -> bool:
    """Whether it is a URI rather than a path; a Windows drive's one letter is a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def masked(text: str) -> str:
    """``text`` without what can be a secret in a URI: user, password, and keys in its query."""
    text = re.sub(r"(?<=://)[^@\s]*@", "***@", text)
    named = r"(?i)([?&][^=&\s]*(?:key|secret|token|password|sig)[^=&\s]*=)[^&\s]+"
    return re.sub(named, r"\1***", text)


def join(uri: str, name: str) -> str:
    """``name`` below ``uri``, whose query stays at the end."""
    base, mark, query = uri.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def open_remote(uri: str) -> Remote:
    """Raises ``RemoteError`` for a URI that pyarrow can't reach."""
    from pyarrow import ArrowException, fs

    try:
        # From the URI, not by its class: only so does S3 heed AWS_ENDPOINT_URL (seen with 26.0).
        filesystem, root = fs.FileSystem.from_uri(uri)
        filesystem.get_file_info(root)
    except (ArrowException, OSError, ValueError) as error:
        raise RemoteError(f"{masked(uri)} can't be used ({_reason(error, uri)})") from None
    if not root.strip("/"):
        raise RemoteError(f"{masked(uri)} names no bucket or folder")
    return Remote(filesystem, root.rstrip("/"), uri)


def _reason(error: BaseException, uri: str) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return masked(first.replace(uri, masked(uri)))[:300]


def _patiently(remote: Remote, what: str, attempt: Callable[[], T]) -> T:
    """``attempt()``, again after each of ``WAITS_S`` while the store does not answer."""
    from pyarrow import ArrowException

    for wait in (*WAITS_S, None):
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except (ArrowException, OSError) as error:
            if wait is None:
                raise RemoteError(
                    f"{masked(remote.uri)}: {what} failed ({_reason(error, remote.uri)})"
                ) from None
            time.sleep(wait)
    raise AssertionError("the last wait is None")


def listing(remote: Remote, folder: str = "") -> dict[str, int]:
    """{name below ``folder``: size in bytes} of all files; empty when there is no such folder."""
    return {name: info.size for name, info in _listed(remote, folder).items()}


def _listed(remote: Remote, folder: str) -> dict[str, FileInfo]:
    from pyarrow import fs

    base = remote.path(folder) if folder else remote.root
    selector = fs.FileSelector(base, allow_not_found=True, recursive=True)
    found = _patiently(remote, "listing", lambda: remote.filesystem.get_file_info(selector))
    return {info.path[len(base) + 1 :]: info for info in found if info.type == fs.FileType.File}


class Dated(NamedTuple):
    """A file's size in bytes, and when it was written, in ns since 1970."""

    size: int
    mtime_ns: int


def dated(remote: Remote) -> dict[str, Dated]:
    """As ``listing``."""
    return {
        name: Dated(info.size, info.mtime_ns or 0) for name, info in _listed(remote, "").items()
    }


def read(remote: Remote, name: str) -> bytes | None:
    """The whole file, or ``None`` when there is none."""

    def attempt() -> bytes:
        with remote.filesystem.open_input_stream(remote.path(name), compression=None) as stream:
            return bytes(stream.read())

    try:
        return _patiently(remote, f"reading {name}", attempt)
    except FileNotFoundError:
        return None


def write(remote: Remote, name: str, content: bytes) -> None:
    """The file appears whole or not at all."""
    path = remote.path(name)
    filesystem = remote.filesystem
    whole = filesystem.type_name in _PUT_WHOLE
    temporary = path if whole else str(PurePosixPath(path).with_name(f".{Path(path).name}.tmp"))

    def attempt() -> None:
        if not whole:
            filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
        with filesystem.open_output_stream(temporary, compression=None) as stream:
            stream.write(content)
        if not whole:
            filesystem.move(temporary, path)

    _patiently(remote, f"writing {name}", attempt)


def delete(remote: Remote, names: Iterable[str]) -> None:
    """What is gone already stays so."""
    for name in names:
        gone = partial(remote.filesystem.delete_file, remote.path(name))
        with contextlib.suppress(FileNotFoundError):
            _patiently(remote, f"deleting {name}", gone)


def travels(name: str) -> bool:
    """Whether a study's file belongs into the store: Ray's runs and hidden files do not."""
    parts = PurePosixPath(name).parts
    return not parts[0].startswith("run-") and not any(part.startswith(".") for part in parts)


def fetch(remote: Remote, folder: Path, names: Mapping[str, int] | Iterable[str]) -> None:
    """Downloads the files ``names`` to the same places below ``folder``, each whole.

    Names that would leave ``folder`` are refused with a ``RemoteError``.
    """

    def one(name: str) -> None:
        if ".." in PurePosixPath(name).parts:
            raise RemoteError(f"{masked(remote.uri)}: {name!r} is no name of a study's file")
        content = read(remote, name)
        if content is not None:  # deleted since it was listed
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: temporary.write_bytes(content))

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(one, list(names)):
            pass


def local_files(folder: Path) -> dict[str, tuple[int, int]]:
    """{name: (size, modification time in ns)} of the files below ``folder`` that travel."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if travels(name) and path.is_file():
            stat = path.stat()
            found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def empty(folder: Path) -> None:
    """Removes the files below ``folder`` that travel; what is local stays."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if travels(entry.name):
            discard(entry)


def discard(entry: Path) -> None:
    """A file, or a folder with all that is in it."""
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink()
