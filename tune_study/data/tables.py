"""Tables of images as the ``datasets`` library finds them, and their columns, a few rows at a time.

It is an optional extra. No code of a data set is run, and nothing of a folder is copied.
"""

from __future__ import annotations

import errno
import glob
import re
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tune_study.config import Columns
from tune_study.data.names import HUB, Hub
from tune_study.errors import UserError, first_line

LABELS = ("label", "labels")
"""What a column of labels is called that has no names of classes."""
ROWS_AT_ONCE = 100
"""Of a parquet file, as the library itself writes them."""
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC)
_NETWORK = {
    "HfHubHTTPError",
    "HTTPError",
    "ConnectionError",
    "TimeoutError",
    "LocalEntryNotFoundError",
}
"""Names of what the hub's and the HTTP library raise, whichever these are."""
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_WORDS_OF_LABELS = re.compile(r"u?int\d+|bool|(large_)?string")


class Tables(NamedTuple):
    """The splits of a data set, which have the same columns."""

    features: Mapping[str, Any]
    splits: Sequence[str]
    read: Callable[[str, str], Iterator[Any]]
    """The values of (a split's, column)."""
    arrow: Mapping[str, list[str]]
    """The Arrow files of every split; none of a folder in another format."""


@contextmanager
def opened(dataset: str, hub: Hub, *, download: bool) -> Iterator[Tables | None]:
    """``None`` where it would have to be downloaded and is not to be.

    Raises ``UserError`` for what the library cannot open, or is not there for.
    """
    library = _library(dataset)
    with tempfile.TemporaryDirectory() as folder:
        with _in_a_sentence(dataset, hub):
            if hub.folder is None:
                found = _of_the_hub(library, dataset, hub, download=download)
            else:
                found = _of_a_folder(library, dataset, hub, folder)
        yield found and found._replace(read=partial(_read, dataset, hub, found.read))


def _read(
    dataset: str, hub: Hub, read: Callable[[str, str], Iterator[Any]], split: str, column: str
) -> Iterator[Any]:
    with _in_a_sentence(dataset, hub):
        yield from read(split, column)


def values(
    dataset: str, hub: Hub, arrow: Mapping[str, list[str]], split: str, column: str
) -> Iterator[Any]:
    """All of one split; ``arrow`` is that of the ``Tables``."""
    if arrow:
        with _in_a_sentence(dataset, hub):
            yield from _of_arrow(arrow[split], column)
    else:
        with opened(dataset, hub, download=False) as found:
            assert found is not None
            yield from found.read(split, column)


def _library(dataset: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"dataset {dataset}: it needs the datasets package; pip install 'tune-study[hf]'"
        ) from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it is told in one sentence
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _of_a_folder(library: Any, dataset: str, hub: Hub, cache_dir: str) -> Tables:
    root = hub.folder
    assert root is not None
    if not root.is_dir():
        raise UserError(f"dataset {dataset}: there is no such folder")
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        if hub.configuration:
            raise UserError(
                f"dataset {dataset}: what save_to_disk wrote has no configurations; leave out "
                f"@{hub.configuration}"
            )
        return _mapped(library.load_from_disk(str(root), keep_in_memory=False))
    if glob.has_magic(place := str(root.resolve())):
        raise UserError(
            f"dataset {dataset}: the datasets library takes * ? [ in {place} for a pattern of "
            "names; rename that folder"
        )
    builder = library.load_dataset_builder(str(root), hub.configuration, cache_dir=cache_dir)
    files = [str(file) for some in builder.config.data_files.values() for file in some]
    if zipped := [file for file in files if file.lower().endswith(".zip")]:
        raise UserError(f"dataset {dataset}: it holds archives ({zipped[0]}); unpack them")
    splits = builder.as_streaming_dataset()
    features = dict(next(iter(splits.values())).features or {})

    def read(split: str, column: str) -> Iterator[Any]:
        if builder.name == "parquet":  # no other column is read
            builder.config.columns, builder.config.batch_size = [column], ROWS_AT_ONCE
            builder.info.features = library.Features(features)
        rows = builder.as_streaming_dataset()[split]
        if isinstance(features[column], library.Image):
            rows = rows.cast_column(column, library.Image(decode=False))
        return (row[column] for row in rows.select_columns([column]))

    return Tables(features, list(splits), read, {})


def _of_the_hub(library: Any, dataset: str, hub: Hub, *, download: bool) -> Tables | None:
    """In the library's own cache; asked for on the hub first, where that answers."""
    name = hub.repository
    if not _NAME.fullmatch(name):
        raise UserError(f"dataset {dataset}: write it as {HUB}NAME, {HUB}OWNER/NAME or {HUB}./PATH")
    if Path(name).exists():  # the library would take the folder
        raise UserError(
            f"dataset {dataset}: there is a folder of that name here; write {HUB}./{name} for it, "
            "or give the command from another folder"
        )
    offline = library.config.HF_HUB_OFFLINE
    if download and not offline and _answers():
        return _mapped(library.load_dataset(name, hub.configuration, keep_in_memory=False))
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            repo_id=name,
            dataset_name=name.rpartition("/")[2],
            config_name=hub.configuration,
            version="auto",
            hash="auto",
        )
    except ValueError as error:
        if "multiple" in str(error):
            raise
        if not download:
            return None
        where = library.config.HF_DATASETS_CACHE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer"
        remedy = "unset it once" if offline else "connect to the network once"
        raise UserError(
            f"dataset {dataset}: {why}, and it is not in the cache {where}; {remedy}"
        ) from None
    return _mapped(builder.as_dataset(in_memory=False))


def _answers() -> bool:
    """One look first: without a network the library would retry for minutes."""
    from huggingface_hub import constants

    try:
        with suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(constants.ENDPOINT, timeout=20).close()
    except OSError:
        return False
    return True


def _mapped(found: Any) -> Tables:
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    arrow = {str(name): [f["filename"] for f in s.cache_files] for name, s in splits.items()}
    features: dict[str, Any] = {}
    for split in splits.values():
        for column, feature in split.features.items():
            if is_class_label(features.setdefault(column, feature)) and features[column] != feature:
                raise ValueError(f"column {column} has other classes in another split")
    return Tables(
        features, list(arrow), lambda split, column: _of_arrow(arrow[split], column), arrow
    )


def _of_arrow(files: Sequence[str], column: str) -> Iterator[Any]:
    """Read, not mapped: mapped pages would count as this process's memory."""
    import pyarrow as pa

    for file in files:
        with pa.OSFile(file) as source:
            for batch in pa.ipc.open_stream(source):
                if column in batch.schema.names:
                    values = batch.column(column)
                    values.validate(full=True)  # a damaged one could lead anywhere in memory
                    yield from (value.as_py() for value in values)
                else:  # as a test split without labels
                    yield from [None] * len(batch)


def columns_of(dataset: str, features: Mapping[str, Any], wanted: Columns) -> tuple[str, str]:
    """(images, labels). Raises ``UserError`` where they cannot be told."""
    for option, name in zip(("image", "label"), wanted, strict=True):
        if name is not None and name not in features:
            raise UserError(
                f"data.{option}_column = {name}: {dataset} has no such column; it has "
                f"{', '.join(features)}"
            )
    images = [name for name, feature in features.items() if _is_image(feature)]
    image = wanted.image or _only(dataset, features, images, "image", "images")
    if not (_is_image(features[image]) or _dtype(features[image]) in _FILES):
        raise UserError(
            f"data.image_column = {image}: this column of {dataset} holds no images"
            f"{' but ' + ', '.join(images) if images else ''}; name one that does"
        )
    labels = [name for name, feature in features.items() if is_class_label(feature)]
    usable = [n for n, f in features.items() if n != image and _is_label(f)]
    plain = [name for name in usable if name.lower() in LABELS]
    label = wanted.label or _only(dataset, features, labels or plain, "label", "labels", usable)
    if label not in usable:
        raise UserError(
            f"data.label_column = {label}: this column of {dataset} holds no labels, one for an "
            f"image; name one of {', '.join(usable) or 'another data set'}"
        )
    return image, label


_FILES = ("binary", "large_binary", "string", "large_string")
"""What a column may hold that is named as that of images: bytes of files, or paths."""


def _only(
    dataset: str,
    features: Mapping[str, Any],
    found: Sequence[str],
    option: str,
    what: str,
    usable: Sequence[str] | None = None,
) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"dataset {dataset}: its columns {' and '.join(found)} all hold {what}; name one with "
            f"--set data.{option}_column={found[0]}"
        )
    offered = list(features if usable is None else usable)
    example = offered[0] if offered else "COLUMN"
    known = f" ({', '.join(features)})" if features else ""
    raise UserError(
        f"dataset {dataset}: none of its columns{known} is known to hold {what}; name one with "
        f"--set data.{option}_column={example}"
    )


def is_class_label(feature: Any) -> bool:
    """Whether a column holds classes that have names."""
    return type(feature).__name__ == "ClassLabel"


def _is_image(feature: Any) -> bool:
    """Also where a parquet file does not say so, but holds files as the library writes them."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return type(feature).__name__ == "Image"


def _is_label(feature: Any) -> bool:
    return is_class_label(feature) or bool(_WORDS_OF_LABELS.fullmatch(_dtype(feature)))


def _dtype(feature: Any) -> str:
    """``int64``, ``string``; "" of what is no single value."""
    return str(feature.dtype) if type(feature).__name__ == "Value" else ""


@contextmanager
def _in_a_sentence(dataset: str, hub: Hub) -> Iterator[None]:
    """Whatever the library raises over files and names of strangers becomes a ``UserError``."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"dataset {dataset}: {_sentence(hub, error)}") from error


def _sentence(hub: Hub, error: BaseException) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and len(causes) < 10:
        causes.append(cause)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    said = str(error)
    if (
        type(error) is ValueError
        and "onfig" in said
        and (listed := re.search(r"\[(.*)\]|cache: (.*)", said))
    ):
        offered = re.sub(r"['\"]", "", listed[1] or listed[2])
        return f"its configurations are {offered}; name one of them as {HUB}{hub.repository}@NAME"
    if "GatedRepoError" in kinds or "gated" in said:
        return "it is gated; ask for access on its page of the hub, and log in with hf auth login"
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return (
            "the hub has no such data set, or does not show it to you; correct the name, log in "
            f"with hf auth login, or write {HUB}./PATH for a folder"
        )
    if "scripts are no longer supported" in said:
        return "it is a program, and none is run; name a data set of files, or a copy of it"
    if kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return "it has no files of images, parquet or arrow; name another"
    if hub.folder is None and getattr(causes[-1], "errno", None) in _UNWRITABLE:
        return (
            f"the cache of the datasets library can't be written ({first_line(causes[-1])}); set "
            "HF_HOME to a folder with room that can"
        )
    if kinds & _NETWORK:
        return (
            f"it could not be downloaded ({type(causes[-1]).__name__}); connect to the network and "
            "give the command again"
        )
    return (
        f"its files cannot be read ({type(causes[-1]).__name__}: {first_line(causes[-1])[:200]}); "
        "replace them by whole ones"
    )
