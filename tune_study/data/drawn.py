"""A data set that a function of the user's file draws: ``code:FUNCTION``.

The command calls the function, once. ``CACHE/images/KEY.drawn`` holds the images that it gave, as
files one after another: bytes as they came, what was an image as a PPM. From there they are decoded
as a folder's are, at any side. The JSON file beside says where each begins, and is written last.
The key is the code's own checksum and the function's name: another text is called again.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from search_spaces import own_code
from search_spaces.own_code import Code
from tune_study.config import CODE
from tune_study.data import cache, decoding
from tune_study.data.folders import touched
from tune_study.data.labels import Label, numbered
from tune_study.data.listed import Images, InParts, rows_of
from tune_study.data.place import Place
from tune_study.errors import UserError, first_line
from tune_study.folder.files import write_json, write_whole

READER = 1
"""Goes up when an image would be kept as other bytes than before."""
PARTS = ("train", "val", "test")


class _Recorded(cache.Sealed):
    """Fields of ``Drawn``, and the bytes of every image; numbers as text."""

    class_names: list[str]
    labels: dict[str, str]
    lengths: str
    unused: list[str]


@dataclass(frozen=True)
class Drawn(InParts):
    """What a function has drawn."""

    dataset: str
    source: str
    """``leaves in my_images.py``."""
    path: Path
    """Of the images."""
    class_names: list[str]
    parts: dict[str, Images]
    lengths: np.ndarray
    """int64 [N], bytes of each image."""
    unused: list[str]
    """What is not looked at, in words."""

    @property
    def key(self) -> bytes:
        return os.fsencode(self.path.name)

    def told(self) -> list[str]:
        said = [f"drawn by {self.source}"]
        return [*said, f"passed over: {', '.join(self.unused)}"] if self.unused else said

    def stamp(self) -> tuple[str, int]:
        """It is written once, and so settled."""
        return touched([(str(self.path), "")])[0], 0

    def files(self) -> Iterator[tuple[bytes, str]]:
        with self.path.open("rb") as file:
            for length in self.lengths.tolist():
                yield file.read(length), ""


class Reading(NamedTuple):
    """The user's function, as sentences name it."""

    dataset: str
    name: str
    file: str

    @property
    def source(self) -> str:
        return f"{self.name} in {self.file}"

    def refused(self, why: str) -> UserError:
        return UserError(f"dataset {self.dataset}: {why}")

    @contextmanager
    def its_own_errors(self, part: str) -> Iterator[None]:
        """Whatever the user's own code raises becomes a ``UserError``."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise self.refused(
                f"{self.name}({part!r}) of {self.file} fails ({type(error).__name__}: "
                f"{first_line(error)[:300]}); correct it, or return None where there is no such "
                "part"
            ) from error


def find(dataset: str, place: Place, *, dry: bool = False) -> Drawn | None:
    """What the function of ``dataset`` draws: from the cache, else it is called.

    A ``dry`` look calls and records nothing: ``None`` where it was not called before. Raises
    ``UserError`` where there is no such function, or where what it gives is no data set.
    """
    setting, name = f"dataset {dataset}", dataset.removeprefix(CODE)
    code = own_code.given(setting, place.code)
    path = _path(place, code, name)
    reading = Reading(dataset, name, code.file)
    if (known := _known(path, reading)) is not None:
        return known
    function = own_code.function_of(setting, name, code)
    if dry:
        return None
    with cache.writable(place), cache.alone(path):
        if _known(path, reading) is None:  # no other process was first
            _draw(reading, function, path)
    return _known(path, reading)


def _path(place: Place, code: Code, name: str) -> Path:
    key = cache.record_name(f"code {READER} {code.sha256} {name}".encode())
    return place.cache() / "images" / f"{key}.drawn"


def _record_of(path: Path) -> Path:
    return path.with_suffix(".drawn.json")


def _known(path: Path, reading: Reading) -> Drawn | None:
    """``None`` where nothing whole was drawn."""
    known = cache.recorded(_Recorded, _record_of(path))
    if known is None or not known.is_whole or not path.is_file():
        return None
    lengths = cache.from_text(known.lengths)
    if path.stat().st_size != lengths.sum():
        return None
    parts = {part: rows_of(part, cache.from_text(text)) for part, text in known.labels.items()}
    return Drawn(
        reading.dataset, reading.source, path, known.class_names, parts, lengths, known.unused
    )


def _draw(reading: Reading, function: Callable[[str], Any], path: Path) -> None:
    """Calls the function and keeps what it gives, an image at a time. Raises ``UserError``."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        left.unlink()
    record: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        lengths: list[int] = []
        labels: dict[str, list[Label]] = {}
        classes: list[str] | None = None
        with temporary.open("wb") as file:
            for part in PARTS:
                with reading.its_own_errors(part):
                    images = function(part)
                    if part == "train" and hasattr(images, "classes"):
                        classes = [str(name) for name in images.classes]
                if images is not None:
                    labels[part] = _keep(reading, part, images, file, lengths)
        places, names, unused = numbered(labels, classes, reading.source, reading.refused)
        record["labels"] = {part: cache.as_text(some) for part, some in places.items()}
        record.update(class_names=names, lengths=cache.as_text(lengths), unused=unused)

    write_whole(path, write)
    write_json(_record_of(path), _Recorded(**record).sealed())


def _keep(
    reading: Reading, part: str, images: Any, file: BinaryIO, lengths: list[int]
) -> list[Label]:
    """Writes the images of one part and returns their labels. Raises ``UserError``."""
    is_map = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if not is_map and not isinstance(images, Iterable):
        raise reading.refused(
            f"{reading.name}({part!r}) of {reading.file} returns {_described(images)}; return a "
            "data set or another iterable of (image, label)"
        )
    labels: list[Label] = []
    with reading.its_own_errors(part):
        count = len(images) if hasattr(images, "__len__") else None
    # torchvision's data sets have no __iter__, and some no end for Python's own way round that.
    pairs = images if isinstance(images, Iterable) else (images[at] for at in range(count or 0))
    title = f"drawing the {part} images of {reading.dataset}"
    with cache.progress(title, count, shown=True) as advance:
        for pair in _guarded(pairs, reading, part):
            name = f"{part}[{len(labels)}] of {reading.source}"
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise reading.refused(f"{name} is {_described(pair)}; give (image, label)")
            with reading.its_own_errors(part):  # an image may be opened and not read yet
                content = _as_file(pair[0])
            if content is None:
                raise reading.refused(
                    f"the image {name} is {_described(pair[0])}; give a PIL image, an array of "
                    "uint8 [H, W] or [H, W, 3], or the bytes of an image file"
                )
            labels.append(_label(reading, name, pair[1]))
            lengths.append(file.write(content))
            advance(1)
    return labels


Item = TypeVar("Item")


def _guarded(items: Iterable[Item], reading: Reading, part: str) -> Iterator[Item]:
    """``items``; what goes wrong in them is the user's own code's, and not the cache's."""
    with reading.its_own_errors(part):
        iterator = iter(items)
    while True:
        with reading.its_own_errors(part):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _as_file(image: Any) -> bytes | None:
    """The bytes of an image file; ``None`` of what is no image."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or image.size == 0 or not shaped:
            return None
        image = Image.fromarray(image)
    return decoding.as_file(image) if isinstance(image, Image.Image) else None


def _label(reading: Reading, name: str, value: Any) -> Label:
    if isinstance(value, str):
        return str(value)
    try:
        return operator.index(value)
    except TypeError:
        raise reading.refused(
            f"the label of {name} is {_described(value)}; give an integer, or the class as text"
        ) from None


def _described(value: Any) -> str:
    """``float32 [40, 40, 3] (ndarray)``, ``dict``."""
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {list(value.shape)} ({kind})"
    return "None" if value is None else kind
