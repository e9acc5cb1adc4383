"""Which images lie in a folder of class folders. None is opened."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tune_study.data.decoding import suffixes
from tune_study.data.listed import Images, InParts
from tune_study.errors import UserError

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders in lower case, and the part that each of them is."""
LEFTOVERS = {
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
"""What systems leave beside files, in lower case. What begins with a dot is hidden, too."""


ERRORS = "surrogateescape"
"""Names that are no text are what Python makes of their bytes."""


@dataclass(frozen=True)
class Found(InParts):
    """What lies in a folder."""

    root: Path
    class_names: list[str]
    parts: dict[str, Images]
    """``train``, and ``val`` and ``test`` where they are set apart."""
    leftovers: int
    """Hidden files and those of systems: passed over."""
    others: dict[str, int]
    """Files passed over that are no images, by suffix ("" has none)."""
    outside: int
    """Images passed over because they lie in no class folder."""

    @property
    def dataset(self) -> str:
        return f"folder:{self.root}"

    @property
    def key(self) -> bytes:
        """What a record of this folder goes by."""
        return os.fsencode(os.path.realpath(self.root))

    def shown(self, path: str) -> str:
        """``path`` as it is told to the user."""
        return os.path.relpath(path, self.root)

    def told(self) -> list[str]:
        over = passed_over(self)
        return [f"passed over: {over}"] if over else []

    def stamp(self) -> tuple[str, int]:
        """(a digest of every file's place, size and times; the latest of these times)."""
        classes = "\0".join(self.class_names).encode("utf-8", ERRORS)
        images = [
            (path, f"{part} {label}")
            for part, some in self.parts.items()
            for path, label in zip(some.paths, some.labels.tolist(), strict=True)
        ]
        return touched(images, classes)

    def files(self) -> Iterator[tuple[str, str]]:
        return ((path, "") for path in self.paths)


class _Seen:
    """What a walk passes over, counted."""

    def __init__(self, root: Path) -> None:
        self.root, self.leftovers, self.outside = root, 0, 0
        self.others: Counter[str] = Counter()

    def folders(self, folder: Path) -> dict[str, Path]:
        """The folders in ``folder`` that are not left over, by name; files there are counted."""
        found: dict[str, Path] = {}
        for entry in _scanned(self.root, folder):
            if not _is_folder(entry):
                self.outside += self.is_image(entry.name)
            elif _is_left_over(entry.name):
                self.leftovers += 1
            else:
                name = unicodedata.normalize("NFC", entry.name)
                if name in found:
                    raise UserError(
                        f"dataset folder:{self.root}: {folder} has two folders that read {name}; "
                        "merge them"
                    )
                found[name] = Path(entry.path)
        return found

    def is_image(self, name: str) -> bool:
        """Whether a file is one by its name; it is counted where it is none."""
        suffix = os.path.splitext(name)[1].lower()
        if _is_left_over(name):
            self.leftovers += 1
        elif suffix not in suffixes():
            self.others[suffix] += 1
        else:
            return True
        return False

    def images(self, folder: Path) -> list[str]:
        """All below ``folder``, in ImageFolder's order; a loop of links is walked once."""
        return list(self._images(str(folder), frozenset()))

    def _images(self, folder: str, above: frozenset[str]) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in above:
            return
        entries = _scanned(self.root, folder)
        yield from sorted(e.path for e in entries if not _is_folder(e) and self.is_image(e.name))
        for inner in sorted(entry.path for entry in entries if _is_folder(entry)):
            if _is_left_over(os.path.basename(inner)):
                self.leftovers += 1
            else:
                yield from self._images(inner, above | {real})


def _is_left_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in LEFTOVERS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: told as broken, with its reason
        return False


def _scanned(root: Path, folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"dataset folder:{root}: {folder} cannot be read ({error.strerror}); make it readable"
        ) from None


def find(root: Path) -> Found:
    """``root/CLASS/**/*``, or ``root/PART/CLASS/**/*`` with ``PARTS``. Raises ``UserError``."""
    if not root.is_dir():
        raise UserError(f"dataset folder:{root}: there is no such folder")
    seen = _Seen(root)
    folders = seen.folders(root)
    part_folders = _parts(root, folders)
    if part_folders is None:
        classes = {"train": folders}
    else:
        classes = {part: seen.folders(path) for part, path in part_folders.items()}
        others = [path for path in folders.values() if path not in part_folders.values()]
        seen.outside += sum(len(seen.images(path)) for path in others)
    names = sorted(classes["train"])
    if len(names) < 2:
        raise _too_few(root, part_folders["train"] if part_folders else root, classes["train"])
    parts = {}
    for part, paths in classes.items():
        if strangers := sorted(set(paths) - set(names)):
            raise UserError(
                f"dataset folder:{root}: {paths[strangers[0]]} is no class of the training images "
                f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); name it as there, "
                "or take it away"
            )
        images = [seen.images(paths[name]) if name in paths else [] for name in names]
        if part == "train" and (empty := [n for n, i in zip(names, images, strict=True) if not i]):
            raise UserError(
                f"dataset folder:{root}: {paths[empty[0]]} holds no images"
                f"{_suffixes(seen.others)}; add some, or take the folder away"
            )
        if any(images):  # else the part is split off, as one that is not there
            labels = np.repeat(np.arange(len(names)), [len(some) for some in images])
            parts[part] = Images([path for some in images for path in some], labels)
    return Found(root, names, parts, seen.leftovers, dict(seen.others), seen.outside)


def _parts(root: Path, folders: dict[str, Path]) -> dict[str, Path] | None:
    """The folders of the parts; ``None`` where the folders are classes.

    A folder named ``train`` among others is a class, unless a part stands beside it.
    """
    found: dict[str, Path] = {}
    for name, path in sorted(folders.items()):
        if (part := PARTS.get(name.lower())) is not None:
            if part in found:
                raise UserError(
                    f"dataset folder:{root}: {found[part].name} and {name} are both {part}; "
                    "take one away"
                )
            found[part] = path
    if "train" in found and (len(found) > 1 or len(folders) == 1):
        return {part: found[part] for part in ("train", "val", "test") if part in found}
    if found and len(found) == len(folders):
        raise UserError(
            f"dataset folder:{root}: it has {' and '.join(p.name for p in found.values())} and no "
            "train; add it"
        )
    return None


def _too_few(root: Path, where: Path, classes: dict[str, Path]) -> UserError:
    said = (
        f"dataset folder:{root}: it needs at least two class folders with images, and {where} has "
        f"{len(classes)}"
    )
    for path in classes.values():
        inner = [e for e in _scanned(root, path) if _is_folder(e) and not _is_left_over(e.name)]
        if len(inner) > 1:
            return UserError(f"{said}; did you mean folder:{path}?")
    return UserError(f"{said}; make a folder of images for every class")


def _suffixes(others: dict[str, int]) -> str:
    """`` (2 .txt, 1 without a suffix)``; nothing where there are none."""
    words = [f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(others.items())]
    return f" ({', '.join(words[:5])}{', ...' if len(words) > 5 else ''})" if words else ""


def passed_over(found: Found) -> str:
    """What of the folder is not looked at, in words; "" where that is nothing."""
    words = []
    if found.leftovers:
        words.append(f"{found.leftovers} hidden or of the system")
    if found.others:
        words.append(f"{sum(found.others.values())} no images{_suffixes(found.others)}")
    if found.outside:
        words.append(f"{found.outside} images outside of class folders")
    return ", ".join(words)


def touched(files: Iterable[tuple[str, str]], begun: bytes = b"") -> tuple[str, int]:
    """(a digest of every file's place, size and times and of what is said of it; the latest time).

    Times are in ns since 1970. ``ctime`` is the system's own: it changes with the content, whatever
    a program sets.
    """
    digest, newest = hashlib.sha256(begun), 0
    for path, said in files:
        try:
            status = os.stat(path)
            times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError:  # a link to nothing: told as broken, with its reason
            times = (0, 0, 0)
        newest = max(newest, *times[1:])
        digest.update(os.fsencode(path) + f"\0{said} {times}\n".encode())
    return digest.hexdigest(), newest


def at(found: Found, root: Path) -> Found:
    """The same files below another folder."""
    parts = {
        part: images._replace(paths=[str(root / found.shown(path)) for path in images.paths])
        for part, images in found.parts.items()
    }
    return replace(found, root=root, parts=parts)


def sizes(found: Found) -> list[int]:
    """Bytes of every file; -1 where there is none."""
    return [_size(path) for path in found.paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
