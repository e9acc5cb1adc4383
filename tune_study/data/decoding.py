"""One image file, as people's files are, becomes a square of RGB.

What is shown is what a viewer shows: turned as EXIF says, on white where it is transparent, the
first frame of an animation. Values of more than 8 bits are scaled, never cut off.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from tune_study.errors import first_line

MOST_PIXELS = 2**28
"""Of an image; a larger one would take more than a gigabyte to read."""
LARGE_PIXELS = 2**25
"""Images with more are read one at a time, however many cores there are."""
PANORAMA = 16
"""An image that is so many times as long as it is short is one."""
NOT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Pillow tells these formats, and reads none of them by itself: EPS would start another program."""

_one_large = threading.Lock()


class Unreadable(Exception):
    """A file that is no whole image, in a few words."""


File = str | Path | bytes | Unreadable
"""An image file: where it lies, what it holds, or why there is none."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it reads here."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_PIXELS))


@cache
def suffixes() -> frozenset[str]:
    """Of files in these formats, in lower case."""
    known = formats()
    return frozenset(s for s, name in Image.registered_extensions().items() if name in known)


@contextmanager
def bounded() -> Iterator[None]:
    """Within it Pillow refuses an image of more than ``MOST_PIXELS``, and warns of none.

    Pillow's limit is the process's own: this stands around the threads that decode.
    """
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which is not used
        Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # an error comes from twice as many on
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def shorter_side(file: File) -> int:
    """Pixels of the shorter side, from the file's head. Raises ``Unreadable``."""
    with _opened(file) as image:
        return min(image.size)


def square(file: File, side: int, interpolation: str) -> np.ndarray:
    """uint8 [3, side, side]: what torchvision's ``Resize(side)`` and ``CenterCrop(side)`` make.

    ``interpolation`` is "bilinear" or "bicubic". Raises ``Unreadable``.
    """
    image = _opened(file)
    if image.width * image.height <= LARGE_PIXELS:
        return _square(image, side, interpolation)
    with _one_large:
        return _square(image, side, interpolation)


def rgb(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a file's bytes, as Pillow converts it. Raises ``Unreadable``."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.uint8)
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def as_file(image: Image.Image) -> bytes:
    """A PPM or PGM file of what is shown of ``image``, with the pixels that ``square`` would see.

    The same on every machine, as a PNG of another zlib is not. Raises what Pillow does.
    """
    shown = _plain(_upright(image), image.format)
    kind = b"P5" if shown.mode == "L" else b"P6"
    return b"%s\n%d %d\n255\n" % (kind, *shown.size) + shown.tobytes()


def _opened(file: File) -> Image.Image:
    """Its head is read. Raises ``Unreadable``."""
    if isinstance(file, Unreadable):
        raise file
    try:
        if isinstance(file, bytes):
            whole: io.BytesIO | str | Path = io.BytesIO(file)
        elif stat.S_ISREG(os.stat(file).st_mode):
            whole = file
        else:  # reading a pipe would wait for a writer
            raise Unreadable("it is not a file")
        try:
            image = Image.open(whole, formats=formats())
        except ValueError:  # Pillow's limits of texts; without them the image itself may be whole
            data = file if isinstance(file, bytes) else Path(file).read_bytes()
            image = Image.open(io.BytesIO(_without_texts(data)), formats=formats())
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise Unreadable(f"{image.width} x {image.height} pixels are more than are read")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image"
    if isinstance(error, Image.DecompressionBombError):
        return "it has more pixels than are read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return first_line(error)[:100]


TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def _without_texts(data: bytes) -> bytes:
    """A PNG's bytes without the parts that Pillow unpacks into memory.

    Raises ``ValueError`` for another file.
    """
    if not data.startswith(PngImagePlugin._MAGIC):
        raise ValueError("it is no image")
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 12 + length
        if data[at + 4 : at + 8] not in TEXTS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _square(image: Image.Image, side: int, interpolation: str) -> np.ndarray:
    try:
        with image:
            image.load()
            shown = _plain(_upright(image), image.format)
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    # Grey stays one channel until it is small.
    fitted = _fitted(shown, side, interpolation).convert("RGB")
    return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))


def _fitted(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    """Bit for bit what torchvision's ``Resize(side)`` and ``CenterCrop(side)`` make.

    Of a ``PANORAMA`` to a few levels of 255, for its ends are not resized.
    """
    resample = Image.Resampling[interpolation.upper()]
    short = min(image.size)
    wide, high = (int(side * length / short) for length in image.size)
    left, top = (round((length - side) / 2.0) for length in (wide, high))
    kept = (left, top, left + side, top + side)
    if max(wide, high) <= PANORAMA * side:
        return image.resize((wide, high), resample).crop(kept)
    across, down = image.width / wide, image.height / high
    box = (left * across, top * down, kept[2] * across, kept[3] * down)
    return image.resize((side, side), resample, box)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; one that makes no sense says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  (as above; the pixels are read by now)
        return image


def _plain(image: Image.Image, format: str | None) -> Image.Image:
    """Grey ("L") or "RGB" of 8 bits, on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled(image, format)
    if image.mode == "La":  # Pillow goes no straight way
        image = image.convert("LA")
    if ("A" in image.mode.upper() and image.mode != "LAB") or "transparency" in image.info:
        shown = image.convert("RGBA")
        white = Image.new("RGBA", shown.size, "white")
        return Image.alpha_composite(white, shown).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _scaled(image: Image.Image, format: str | None) -> Image.Image:
    """Grey of 16 bits, of 32, or in floats: from its range to 0..255.

    16 bits are divided by 257. Floats are taken as 0..1, else 32-bit values as 0..255 or 0..65535,
    by the least of these ranges that holds the image; where none does, its own least value is black
    and its greatest white.
    """
    values = np.asarray(image)
    key = image.info.get("transparency")
    clear = values == key if isinstance(key, int) else None
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        grey = (values.astype(np.int64 if image.mode == "I" else np.uint32) * 255 + 32767) // 65535
    else:
        grey = _stretched(values, floats=image.mode == "F")
    grey = np.clip(grey, 0, 255).astype(np.uint8)
    if clear is not None:
        grey[clear] = 255
    return Image.fromarray(grey)


def _stretched(values: np.ndarray, *, floats: bool) -> np.ndarray:
    finite = np.isfinite(values)
    least, greatest = (
        (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    )
    known = [1.0, 255.0, 65535.0] if floats else [255.0, 65535.0]
    top = next((range_ for range_ in known if least >= 0 and greatest <= range_), None)
    low, high = (least, greatest) if top is None else (0.0, top)
    whole = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((whole - low) * (255 / (high - low)))
