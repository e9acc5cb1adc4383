"""Data and weights on their way to the nodes of a cluster: once per node, by Ray's object store.

The images of a folder or table are in each node's own cache before the first trial, and go whole
through no machine's memory: a node that sees the same files of a folder, on a shared disk or behind
a URI, decodes them itself, and any other fetches what the driver has decoded, piece by piece. The
nodes need no file of the driver's, no network and no library that reads it. What the project ships
itself is on every node already.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_study.config import TrialConfig
from tune_study.data import cache, folders
from tune_study.data.buckets import folder_of
from tune_study.data.folders import Found
from tune_study.data.mapped import Mapped
from tune_study.data.names import FOLDER, is_bucket
from tune_study.data.place import Place, Preprocessing
from tune_study.data.sources import Source, Split, key_of, provide, source_of
from tune_study.folder.files import write_whole
from tune_study.model.build import preprocessing
from tune_study.model.weights import hub_weights, weights_file
from tune_study.trial.context import RunContext

PIECE_BYTES = 64 * 2**20
"""Of a file of images, on its way from node to node: what memory holds of it at a time."""


class Inputs(NamedTuple):
    """References into the object store, by data set (``key_of``) and by model."""

    data: dict[str, ray.ObjectRef | Distant]
    weights: dict[str, tuple[str, ray.ObjectRef]]
    """(the file's suffix, its bytes)."""


class Distant(NamedTuple):
    """Images of a folder or table: a file of the driver's cache, which is fetched piecewise."""

    reader: Any
    """The actor that reads the file, where it lies."""
    name: str
    shape: cache.Shape
    parts: dict[str, tuple[np.ndarray, np.ndarray]]
    """Places in the file, and labels."""
    class_names: list[str]
    sha256: str
    broken: dict[int, str]
    """As ``cache.Pixels``."""
    dataset: str
    """Its name, from wherever it is read."""
    interpolation: str
    files: Any
    """A reference to the driver's ``Found`` and the sizes of its files; ``None`` of no folder."""


class _Reader:
    """Lives on the driver's node."""

    def __init__(self, path: str) -> None:
        self._path = path

    def piece(self, number: int) -> np.ndarray:
        """uint8, ``PIECE_BYTES`` of them but for the last."""
        return np.fromfile(self._path, np.uint8, PIECE_BYTES, offset=number * PIECE_BYTES)


def ship(trials: Sequence[TrialConfig], context: RunContext) -> Inputs:
    """Puts what the trials need into the object store; Ray copies it to a node that asks."""
    sources: dict[str, ray.ObjectRef | Distant] = {}
    for trial in trials:
        how, columns = preprocessing(trial), trial.data.columns
        if (key := key_of(trial.dataset, how, columns)) not in sources:
            source = source_of(trial.dataset, context.place, how, columns)
            distant = isinstance(source.train.images, Mapped)
            given = _distant(source, trial.dataset, how) if distant else ray.put(_plain(source))
            sources[key] = given
    weights = {}
    for model in dict.fromkeys(trial.model for trial in trials if trial.pretrained):
        path = weights_file(model, context.weights) if context.weights else hub_weights(model)
        if path is not None:  # else the package ships them
            weights[model] = path.suffix, ray.put(np.fromfile(path, np.uint8))
    return Inputs(sources, weights)


def _plain(source: Source) -> list[Any]:
    """Arrays, which workers of a node map into their memory without a copy."""
    splits = [part and tuple(np.asarray(some) for some in part) for part in source[:2]]
    return [*splits, source.class_names, source.sha256]


def _distant(source: Source, dataset: str, how: Preprocessing) -> Distant:
    parts = {}
    for name, part in source.parts.items():
        assert isinstance(part.images, Mapped)
        path, shape = part.images.path, part.images.whole
        parts[name] = part.images.rows.numpy(), part.labels.numpy()
    broken, found = cache.whole(path, shape), source.found
    assert broken is not None
    files = None
    if isinstance(found, Found):
        files = ray.put((folders.at(found, found.root.absolute()), folders.sizes(found)))
    return Distant(
        _reader(path),
        path.name,
        shape,
        parts,
        source.class_names,
        source.sha256,
        broken,
        dataset,
        how.interpolation,
        files,
    )


def _reader(path: Path) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Reader)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote(str(path))


def receive(inputs: Inputs, config: TrialConfig, context: RunContext, folder: Path) -> RunContext:
    """``context`` as this node has it.

    Images are in memory, those of a folder or table in the node's cache, fetched once; weights are
    in a file below ``folder``.
    """
    how, columns = preprocessing(config), config.data.columns
    if (given := inputs.data.get(key_of(config.dataset, how, columns))) is not None:
        source = _fetched(given, context.place) if isinstance(given, Distant) else _source(given)
        provide(config.dataset, how, source, columns)
    if config.model not in inputs.weights:
        return context.model_copy(update={"weights": None})
    suffix, reference = inputs.weights[config.model]
    path = folder / f"{config.model.replace('/', '_')}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: ray.get(reference).tofile(temporary))
    return context.model_copy(update={"weights": path})


def into_cache(distant: Distant, place: Place) -> tuple[Path, cache.Shape]:
    """The node's own file of the images, made now unless it is there.

    Raises ``UserError`` where it has no room, or a URI does not answer.
    """

    def fill(temporary: Path) -> dict[int, str]:
        with _same_files(distant, place) as found:
            if found is not None:
                side = distant.shape[-1]
                return cache.decode(found, side, distant.interpolation, temporary)
        with temporary.open("wb") as file:
            for number in range(-(-np.prod(distant.shape, dtype=int) // PIECE_BYTES)):
                ray.get(distant.reader.piece.remote(number)).tofile(file)
        return distant.broken

    return cache.filled(place, distant.name, distant.shape, fill)[:2]


@contextmanager
def _same_files(distant: Distant, place: Place) -> Iterator[Found | None]:
    """The driver's files, as this node sees them; ``None`` where it sees none, or others."""
    drivers, sizes = ray.get(distant.files) if distant.files is not None else (None, [])
    if drivers is None or not (is_bucket(distant.dataset) or drivers.root.is_dir()):
        yield None
        return
    there = distant.dataset if is_bucket(distant.dataset) else f"{FOLDER}{drivers.root}"
    with folder_of(there, place) as root:
        found = folders.at(drivers, root)
        same = folders.sizes(found) == sizes
        # The name begins with the checksum of all that the driver has read.
        same = same and distant.name.startswith(cache.contents(found, place).key)
        yield found if same else None


def _fetched(distant: Distant, place: Place) -> Source:
    path, shape = into_cache(distant, place)
    images = Mapped(path, shape)
    parts = {
        name: Split(images.take(torch.tensor(rows)), torch.tensor(labels))
        for name, (rows, labels) in distant.parts.items()
    }
    test, val = parts.get("test"), parts.get("val")
    return Source(parts["train"], test, distant.class_names, distant.sha256, val)


@functools.lru_cache(maxsize=4)
def _source(reference: ray.ObjectRef) -> Source:
    train, test, class_names, sha256 = ray.get(reference)
    return Source(_split(train), test and _split(test), class_names, sha256)


def _split(arrays: tuple[np.ndarray, np.ndarray]) -> Split:
    # A copy: torch has no tensors that can't be written to, as mapped memory is.
    return Split(*(torch.as_tensor(array.copy()) for array in arrays))
