"""A data set of the Hugging Face hub, or a folder in its formats: ``hf:NAME``, ``hf:./FOLDER``.

Which images it has and of which classes. The ``datasets`` library finds that out and no code of a
data set is run. Images stay where they lie until they are decoded, a few at a time. What was found
is recorded in the cache, with the files that it was found in: where none of them was touched, the
library is not asked, nor is the network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tune_study.config import Columns
from tune_study.data import cache, tables
from tune_study.data.decoding import File, Unreadable
from tune_study.data.folders import PARTS, touched
from tune_study.data.listed import Images, InParts, rows_of
from tune_study.data.names import Hub, hub_of
from tune_study.data.place import Place
from tune_study.data.tables import Tables
from tune_study.errors import UserError
from tune_study.folder.files import write_json

READER = 1
"""Goes up when other rows, columns or classes would be found than before."""
SPLITS = {**PARTS, "dev": "val"}
"""Names of splits in lower case, and the part that each of them is."""


class _Recorded(cache.Sealed):
    """Fields of ``Rows``; ``labels`` as text."""

    reader: int
    stamp: str
    class_names: list[str]
    splits: dict[str, str]
    labels: dict[str, str]
    columns: tuple[str, str]
    arrow: dict[str, list[str]]
    outside: list[str]
    unused: list[str]


@dataclass(frozen=True)
class Rows(InParts):
    """What lies in a data set of the hub's kind."""

    dataset: str
    wanted: Columns
    """As the user named them."""
    columns: tuple[str, str]
    """Of the images and of the labels."""
    class_names: list[str]
    splits: dict[str, str]
    """What each part is called there."""
    parts: dict[str, Images]
    arrow: dict[str, list[str]]
    """The Arrow files of each split; none where the library reads the files."""
    outside: list[str]
    """Image files outside of the folder that the rows name."""
    unused: list[str]
    """What is not looked at, in words."""

    @property
    def key(self) -> bytes:
        return _key(self.dataset, self.wanted)

    def told(self) -> list[str]:
        said = [f"images in column {self.columns[0]}, classes in {self.columns[1]}"]
        if SPLITS.get(self.splits["train"].lower()) != "train":
            said.append(f"its only split is {self.splits['train']}")
        if self.unused:
            said.append(f"passed over: {', '.join(self.unused)}")
        return said

    def stamp(self) -> tuple[str, int]:
        """Over the files of the folder, and those beside it that its rows name.

        Those of the library's own cache are written once, and so settled.
        """
        if (folder := hub_of(self.dataset).folder) is not None:
            return touched((file, "") for file in [*_all_files(folder), *self.outside])
        arrow = ((file, split) for split, some in self.arrow.items() for file in some)
        return touched(arrow)[0], 0

    def files(self) -> Iterator[tuple[File, str]]:
        """Raises ``UserError`` where the rows are not those that were found."""
        hub, outside = hub_of(self.dataset), set(self.outside)
        root = _root(hub)
        for part, split in self.splits.items():
            count = 0
            for value in tables.values(self.dataset, hub, self.arrow, split, self.columns[0]):
                count += 1
                yield _image(value, root, outside)
            if count != len(self.parts[part].labels):
                raise UserError(
                    f"dataset {self.dataset}: its split {split} has {count} rows now and had "
                    f"{len(self.parts[part].labels)} when the command began; give it again"
                )


def find(dataset: str, wanted: Columns, place: Place, *, dry: bool = False) -> Rows | None:
    """The rows of ``dataset``, which is downloaded where it is of the hub and not here.

    A ``dry`` look downloads and records nothing: ``None`` where the data set is not here. Raises
    ``UserError`` where it is no data set of classes of images.
    """
    record = place.cache() / "images" / f"{cache.record_name(_key(dataset, wanted))}.rows.json"
    if (known := _known(record, dataset, wanted)) is not None:
        return known
    began = time.time_ns()
    with tables.opened(dataset, hub_of(dataset), download=not dry) as found:
        if found is None:
            return None
        rows = _looked_at(dataset, wanted, found)
    stamp, newest = rows.stamp()
    if not dry and cache.settled(newest, began):
        with cache.writable(place):
            write_json(record, _record(rows, stamp).sealed())
    return rows


def _key(dataset: str, wanted: Columns) -> bytes:
    """A folder goes by its place, however it is written."""
    hub = hub_of(dataset)
    where = _root(hub) or hub.repository
    return b"\0".join(os.fsencode(str(part)) for part in ("hf", where, hub.configuration, wanted))


def _record(rows: Rows, stamp: str) -> _Recorded:
    labels = {part: cache.as_text(images.labels) for part, images in rows.parts.items()}
    return _Recorded(reader=READER, stamp=stamp, labels=labels, **{
        name: getattr(rows, name)
        for name in ("class_names", "splits", "columns", "arrow", "outside", "unused")
    })  # fmt: skip


def _known(record: Path, dataset: str, wanted: Columns) -> Rows | None:
    """What the record tells, unless something was touched since."""
    known = cache.recorded(_Recorded, record)
    if known is None or not known.is_whole or known.reader != READER:
        return None
    parts = {
        part: rows_of(known.splits[part], cache.from_text(labels))
        for part, labels in known.labels.items()
    }
    rows = Rows(
        dataset, wanted, known.columns, known.class_names, known.splits, parts,
        known.arrow, known.outside, known.unused,
    )  # fmt: skip
    return rows if rows.stamp()[0] == known.stamp else None


def _looked_at(dataset: str, wanted: Columns, found: Tables) -> Rows:
    """Raises ``UserError``."""
    columns = tables.columns_of(dataset, found.features, wanted)
    splits, unused = _parts(dataset, list(found.splits))
    values = {part: list(found.read(split, columns[1])) for part, split in splits.items()}
    label, trained = found.features[columns[1]], set(values["train"])
    for part, split in list(splits.items()):
        missing = sum(_is_missing(value, label, trained) for value in values[part])
        if part != "train" and missing == len(values[part]):
            unused.append(f"split {split} ({'without labels' if missing else 'without images'})")
            del splits[part]
        elif missing:
            raise UserError(
                f"dataset {dataset}: {missing} of the {len(values[part])} images of split {split} "
                f"have no label in column {columns[1]}; name another with --set "
                "data.label_column=COLUMN, or take these images away"
            )
    class_names, numbers = _classes(dataset, columns[1], label, splits, values)
    named = getattr(label, "names", None) or []
    if without := [name for name in named if name not in class_names]:
        unused.append(f"{len(without)} classes without images")
    parts = {
        part: rows_of(split, np.array([numbers[value] for value in values[part]], dtype=np.int64))
        for part, split in splits.items()
    }
    root = _root(hub_of(dataset))
    outside = [] if root is None else _outside(root, splits, columns[0], found)
    arrow = {split: found.arrow[split] for split in splits.values() if split in found.arrow}
    return Rows(dataset, wanted, columns, class_names, splits, parts, arrow, outside, unused)


def _parts(dataset: str, splits: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({part: split}, what is passed over). The only split is for training, whatever its name."""
    if len(splits) == 1:
        return {"train": splits[0]}, []
    found: dict[str, str] = {}
    unused = []
    for split in splits:
        part = SPLITS.get(split.lower())
        if part is None:
            unused.append(f"split {split}")
        elif part in found:
            raise UserError(
                f"dataset {dataset}: its splits {found[part]} and {split} are both {part}; save a "
                "copy with one of them (save_to_disk), and name that"
            )
        else:
            found[part] = split
    if "train" not in found:
        raise UserError(
            f"dataset {dataset}: it has the splits {', '.join(splits)} and no train; save a copy "
            "with one of that name (save_to_disk), and name that"
        )
    return {part: found[part] for part in ("train", "val", "test") if part in found}, unused


def _is_missing(value: Any, label: Any, trained: set[Any]) -> bool:
    """-1 stands for no label among named classes, and among numbers that training has without."""
    if value is None:
        return True
    return value == -1 and (tables.is_class_label(label) or -1 not in trained)


def _classes(
    dataset: str,
    column: str,
    label: Any,
    splits: dict[str, str],
    values: dict[str, list[Any]],
) -> tuple[list[str], dict[Any, int]]:
    """(names, {value: its place among them}): named classes in their order, others sorted.

    Raises ``UserError``.
    """
    known = sorted(set(values["train"]))
    for part, split in splits.items():
        if strangers := sorted(set(values[part]) - set(known)):
            raise UserError(
                f"dataset {dataset}: {_name(label, strangers[0])} in column {column} of split "
                f"{split} is no class of the training images ({', '.join(map(str, known[:5]))}"
                f"{', ...' if len(known) > 5 else ''}); name another column with --set "
                "data.label_column=COLUMN, or add it there"
            )
    if len(known) < 2:
        raise UserError(
            f"dataset {dataset}: it needs at least two classes, and column {column} has "
            f"{len(known)}; name another with --set data.label_column=COLUMN"
        )
    return [_name(label, value) for value in known], {v: place for place, v in enumerate(known)}


def _name(label: Any, value: Any) -> str:
    names = getattr(label, "names", None)
    return names[value] if names and 0 <= value < len(names) else str(value)


def _all_files(folder: Path) -> list[str]:
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)


def _root(hub: Hub) -> str | None:
    """Where a folder really lies."""
    return None if hub.folder is None else os.path.realpath(hub.folder)


def _outside(root: str, splits: dict[str, str], column: str, found: Tables) -> list[str]:
    """Image files elsewhere that the rows name, as the library's own cache has them."""
    first = next(iter(found.read(splits["train"], column)), None)
    if not _lies_outside(_path(first, root), root):
        return []
    every = (_path(value, root) for s in splits.values() for value in found.read(s, column))
    return [path for path in every if path is not None and _lies_outside(path, root)]


def _path(value: Any, root: str | None) -> str | None:
    """The file of an image that is not in the table itself."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else None
    return os.path.join(root or "", value) if isinstance(value, str) else None


def _lies_outside(path: str | None, root: str) -> bool:
    return path is not None and not os.path.abspath(path).startswith(root + os.sep)


def _image(value: Any, root: str | None, outside: set[str]) -> tuple[File, str]:
    """(the file, its name where it has one); ``root`` is the folder, of one."""
    if isinstance(value, bytes):
        return value, ""
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"], value.get("path") or ""
    path = _path(value, root)
    if path is None:
        return Unreadable("there is no image"), ""
    if root is not None:
        name = os.path.relpath(path, root)
        if _lies_outside(path, root) and path not in outside:
            return Unreadable("it lies outside of the folder"), name
    return path, name
