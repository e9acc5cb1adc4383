"""Images, decoded once into one file: whole or not there, for whoever comes later.

``CACHE/images/KEY-SIDE-INTERPOLATION.pixels`` holds uint8 [N, 3, SIDE, SIDE]. The JSON file of that
name says what could not be read, and is written last. The key is a checksum of all files. Which
files a data set had when they were last read, and when they were touched, stands beside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tune_study.data import decoding
from tune_study.data.decoding import File, Unreadable
from tune_study.data.folders import ERRORS
from tune_study.data.listed import Listed
from tune_study.data.place import Place, Preprocessing
from tune_study.errors import UserError
from tune_study.folder.files import read_json, write_bytes, write_json, write_whole
from tune_study.machine.provenance import cores

READER = 1
"""Goes up when an image would be read into other pixels than before."""
LEFT_FREE_BYTES = 256 * 2**20
"""Of the disk, beside a new file."""
DIGITS = 32
"""Hexadecimal ones of each file's checksum."""
MANY = 1000
"""So many images are worth a line where no bar can be shown."""
NAMED = 100
"""Broken files that a sentence names; a file names the rest, too."""
AT_ONCE = 32
"""Images that a thread takes at a time."""
AT_ONCE_BYTES = 8 * 2**20
"""Of image files in memory: a thread then takes fewer."""
SETTLES_NS = 2_000_000_000
"""What was written so shortly before it was read may change again under the same time."""


class Sealed(BaseModel):
    """A record that is none when other hands have changed it."""

    digest: str = ""

    def sealed(self) -> dict[str, Any]:
        """All of it, as it is written."""
        return {**self.model_dump(), "digest": self._seal()}

    @property
    def is_whole(self) -> bool:
        """Whether it is what was written."""
        return self.digest == self._seal()

    def _seal(self) -> str:
        values = json.dumps(self.model_dump(exclude={"digest"}))
        return hashlib.sha256(values.encode()).hexdigest()


def as_text(numbers: Iterable[int]) -> str:
    """Very many integers, as one text of a record."""
    return " ".join(map(str, numbers))


def from_text(text: str) -> np.ndarray:
    """int64 [N] of what ``as_text`` made."""
    return np.array(text.split(), dtype=np.int64)


class _Files(BaseModel):
    """The files of a data set as they were read."""

    reader: int
    stamp: str
    side: int
    digests: str


class _Pixels(BaseModel):
    """What stands beside a file of pixels."""

    shape: tuple[int, int, int, int]
    broken: dict[int, str]


Shape = tuple[int, int, int, int]


class Contents(NamedTuple):
    """What the files of a data set are."""

    digests: list[str]
    key: str
    """Over all of them, and the way they are read."""
    side: int
    """The longest of the images' shorter sides: none is enlarged in the cache."""


class Pixels(NamedTuple):
    """A whole file of the cache."""

    path: Path
    shape: Shape
    broken: dict[int, str]
    """Why an image could not be read, by its place; its pixels are zeros."""
    contents: Contents


def contents(found: Listed, place: Place) -> Contents:
    """Reads all files, unless none was touched since they were read. Raises ``UserError``."""
    with writable(place) as folder:
        record = folder / f"{record_name(found.key)}.files.json"
        began, (touched, newest) = time.time_ns(), found.stamp()
        if (known := _known(record, touched, len(found.paths))) is not None:
            return known
        digests, sides = [""] * len(found.paths), [1] * len(found.paths)

        def look(at: int, file: File, _: str) -> None:
            digests[at], sides[at] = _digest(file), _side(file)

        _each(found, f"looking at the files of {found.dataset}", look)
        if settled(newest, began) and found.stamp()[0] == touched:
            values = {"reader": READER, "stamp": touched, "side": max(sides)}
            write_json(record, {**values, "digests": "".join(digests)})
        return Contents(digests, _key(digests), max(sides))


def record_name(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()[:DIGITS]


def settled(newest: int, began: int) -> bool:
    """Whether what was touched last at ``newest`` can be told from what is touched from now on."""
    return newest < began - SETTLES_NS


def _known(record: Path, touched: str, count: int) -> Contents | None:
    known = recorded(_Files, record)
    if known is None or (known.reader, known.stamp) != (READER, touched):
        return None
    digests = [known.digests[at : at + DIGITS] for at in range(0, DIGITS * count, DIGITS)]
    return Contents(digests, _key(digests), known.side)


Known = TypeVar("Known", bound=BaseModel)


def recorded(kind: type[Known], path: Path) -> Known | None:
    """``None`` where there is no whole one: what it tells is found out anew."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError:
        return None


def _key(digests: list[str]) -> str:
    return hashlib.sha256(f"{READER} {''.join(digests)}".encode()).hexdigest()[:DIGITS]


def _digest(file: File) -> str:
    try:
        if isinstance(file, bytes):
            return hashlib.sha256(file).hexdigest()[:DIGITS]
        if isinstance(file, Unreadable) or not os.path.isfile(file):  # a pipe waits for a writer
            return "0" * DIGITS
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:DIGITS]
    except OSError:  # told as broken, with its reason, when it is decoded
        return "0" * DIGITS


def _side(file: File) -> int:
    try:
        return decoding.shorter_side(file)
    except Unreadable:
        return 1


def identity(found: Listed, contents: Contents, left_out: dict[int, str]) -> str:
    """A checksum of the images that are used: of each one's part, class and file, in order."""
    digest = hashlib.sha256()
    at = 0
    for part, images in found.parts.items():
        for label in images.labels.tolist():
            if at not in left_out:
                name = f"{part}\0{found.class_names[label]}\0{contents.digests[at]}\n"
                digest.update(name.encode("utf-8", ERRORS))
            at += 1
    return digest.hexdigest()


def pixels(found: Listed, how: Preprocessing, place: Place) -> Pixels:
    """The images as ``how`` wants them, decoded now unless they were before.

    Smaller ones are not enlarged: that is done batch by batch. Raises ``UserError`` where the cache
    cannot be written, or has no room.
    """
    known = contents(found, place)
    side = min(how.image_size, known.side)
    shape = (len(found.paths), 3, side, side)
    name = f"{known.key}-{side}-{how.interpolation}.pixels"
    fill = partial(decode, found, side, how.interpolation)
    return Pixels(*filled(place, name, shape, fill), known)


def filled(
    place: Place, name: str, shape: Shape, fill: Callable[[Path], dict[int, str]]
) -> tuple[Path, Shape, dict[int, str]]:
    """``name`` in the cache, made by ``fill(temporary)`` where it is not there as a whole.

    ``fill`` returns what ``Pixels.broken`` is. One process fills, others wait. Raises
    ``UserError`` where the cache cannot be written, or has no room.
    """
    with writable(place) as folder:
        path = folder / name
        if (broken := whole(path, shape)) is None:
            with alone(path):
                if (broken := whole(path, shape)) is None:  # no other process was first
                    broken = _fill(path, shape, fill)
    return path, shape, broken


def whole(path: Path, shape: Shape) -> dict[int, str] | None:
    """What could not be read of a file that is whole; ``None`` where there is none."""
    record = recorded(_Pixels, path.with_suffix(".json"))
    if record is None or not path.is_file() or path.stat().st_size != math.prod(shape):
        return None
    return record.broken if record.shape == shape else None


def _fill(path: Path, shape: Shape, fill: Callable[[Path], dict[int, str]]) -> dict[int, str]:
    what = f"{shape[0]:,} images of {shape[-1]} px"
    refuse_no_room(path.parent, math.prod(shape), what)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        left.unlink()
    broken: dict[int, str] = {}

    def write(temporary: Path) -> None:
        broken.update(fill(temporary))

    write_whole(path, write)
    write_json(path.with_suffix(".json"), {"shape": shape, "broken": broken})
    return broken


def refuse_no_room(folder: Path, needed: int, what: str) -> None:
    """Raises ``UserError`` where ``what``, of so many bytes, does not fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed and free < needed + LEFT_FREE_BYTES:
        raise UserError(
            f"--cache-dir: {what} take {needed / 1e9:,.1f} GB of {folder}, and its disk has "
            f"{free / 1e9:,.1f} GB free; make room (all that is there can be deleted), or name a "
            "folder on another disk"
        )


def refuse_no_room_for(files: Sequence[tuple[str, Shape]], place: Place) -> None:
    """Raises ``UserError`` unless all ``files`` (name, shape) that are not there yet have room."""
    with writable(place) as folder:
        missing = [shape for name, shape in files if whole(folder / name, shape) is None]
        what = f"{sum(shape[0] for shape in missing):,} images"
        refuse_no_room(folder, sum(math.prod(shape) for shape in missing), what)


def written(name: str, shape: Shape, place: Place) -> int:
    """Bytes of ``name`` that are in the cache by now, and those of one that is being made."""
    with writable(place) as folder:
        if whole(folder / name, shape) is not None:
            return math.prod(shape)
        # Blocks: a file that is being decoded has its whole length from the start.
        parts = [path.stat().st_blocks * 512 for path in folder.glob(f".{name}.*.tmp")]
        return min(math.prod(shape), max(parts, default=0))


def decode(found: Listed, side: int, interpolation: str, file_path: Path) -> dict[int, str]:
    """Every image into its place of the file; the others' places stay zeros."""
    one_writer = threading.Lock()
    with file_path.open("wb") as file:
        file.truncate(len(found.paths) * 3 * side**2)

        def keep(at: int, square: np.ndarray) -> None:
            with one_writer:
                file.seek(at * square.nbytes)
                file.write(square.data)

        return _decoded(found, "decoding", side, interpolation, keep)


def look_through(found: Listed, how: Preprocessing) -> dict[int, str]:
    """Why an image cannot be read, by its place: all are decoded, and nothing is kept."""
    return _decoded(found, "looking through", how.image_size, how.interpolation, lambda *_: None)


def _decoded(
    found: Listed,
    doing: str,
    side: int,
    interpolation: str,
    keep: Callable[[int, np.ndarray], None],
) -> dict[int, str]:
    """``keep(place, square)`` of every image; why one cannot be read, by its place, in order."""
    broken: dict[int, str] = {}

    def decode(at: int, file: File, name: str) -> None:
        try:
            square = decoding.square(file, side, interpolation)
        except Unreadable as error:
            broken[at] = f"{name}: {error}" if name else str(error)
        else:
            keep(at, square)

    _each(found, f"{doing} the images of {found.dataset}", decode)
    return dict(sorted(broken.items()))


def refuse_broken(found: Listed, broken: dict[int, str], place: Place) -> None:
    """Raises ``UserError`` that names every broken file, unless they are to be left out."""
    if not broken or (place.leave_out_broken and len(broken) < len(found.paths)):
        return
    words = named(found, broken)
    listed = ", ".join(words[:NAMED])
    if len(words) > NAMED:
        with writable(place) as folder:
            every = folder / "broken.txt"
            write_bytes(every, os.fsencode("\n".join(words) + "\n"))
        listed += f" and {len(words) - NAMED} more, all in {every}"
    raise UserError(
        f"dataset {found.dataset}: {len(broken)} of {len(found.paths)} images cannot be read: "
        f"{listed}; replace the files by whole ones"
        + ("" if place.leave_out_broken else ", or leave them out with --leave-out-broken")
    )


def named(found: Listed, broken: dict[int, str]) -> list[str]:
    """``a/1.png (it is no image)`` of each."""
    paths = found.paths
    return [f"{found.shown(paths[at])} ({reason})" for at, reason in broken.items()]


def _each(found: Listed, title: str, do: Callable[[int, File, str], None]) -> None:
    """``do(place, file, name)`` for every image, on all cores, with a bar in a terminal."""
    count = len(found.paths)
    pool, running = ThreadPoolExecutor(cores(), "images"), deque[Future[int]]()
    with progress(title, count, shown=count >= MANY) as advance, decoding.bounded():

        def some(start: int, files: list[tuple[File, str]]) -> int:
            for at, (file, name) in enumerate(files, start):
                do(at, file, name)
            return len(files)

        try:
            for start, files in _some(found.files()):
                running.append(pool.submit(some, start, files))
                if len(running) > 2 * cores():  # what is read ahead stays small
                    advance(running.popleft().result())
            for done in running:
                advance(done.result())
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def progress(title: str, count: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Takes how many more of ``count`` are done: a bar in a terminal, if it is to be ``shown``.

    Elsewhere a line says that very many begin. ``None`` is a number that is not known.
    """
    console = Console(stderr=True)
    if count is not None and count >= MANY and not console.is_terminal:
        print(f"{title}: {count:,}", file=sys.stderr, flush=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    bar.disable = not console.is_terminal or not shown
    with bar:
        yield partial(bar.advance, bar.add_task(title, total=count))


def _some(files: Iterator[tuple[File, str]]) -> Iterator[tuple[int, list[tuple[File, str]]]]:
    """(place of the first, files), ``AT_ONCE`` or few megabytes at a time."""
    start, held, size = 0, [], 0
    for file, name in files:
        held.append((file, name))
        size += len(file) if isinstance(file, bytes) else 0
        if len(held) == AT_ONCE or size >= AT_ONCE_BYTES:
            yield start, held
            start, held, size = start + len(held), [], 0
    yield start, held


@contextmanager
def writable(place: Place) -> Iterator[Path]:
    """The folder of the cached images. A disk that says no becomes a ``UserError``."""
    folder = place.cache() / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise UserError(
            f"--cache-dir: {folder} cannot be written ({error.strerror}); name another folder"
        ) from None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    lock: Any = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process to fill {path}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
