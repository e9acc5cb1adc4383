"""Data and weights on their way to the nodes of a cluster: once per node, by Ray's object store.

The nodes need no file of the driver's. What the project ships itself is on every node already.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from tune_study.config import TrialConfig
from tune_study.data.sources import Source, Split, provide, read_source
from tune_study.folder.files import write_whole
from tune_study.model.weights import hub_weights, weights_file
from tune_study.trial.context import RunContext


class Inputs(NamedTuple):
    """References into the object store, by data set and by model."""

    data: dict[str, ray.ObjectRef]
    weights: dict[str, tuple[str, ray.ObjectRef]]
    """(the file's suffix, its bytes)."""


def ship(trials: Sequence[TrialConfig], context: RunContext) -> Inputs:
    """Puts what the trials need into the object store; Ray copies it to a node that asks."""
    if context.simulation is not None:
        return Inputs({}, {})
    sources = {
        name: ray.put(_plain(read_source(name, context.data_dir)))
        for name in dict.fromkeys(trial.dataset for trial in trials)
    }
    weights = {}
    for model in dict.fromkeys(trial.model for trial in trials if trial.pretrained):
        path = weights_file(model, context.weights) if context.weights else hub_weights(model)
        if path is not None:  # else the package ships them
            weights[model] = path.suffix, ray.put(np.fromfile(path, np.uint8))
    return Inputs(sources, weights)


def _plain(source: Source) -> list[Any]:
    """Arrays, which workers of a node map into their memory without a copy."""
    splits = [part and (part.images.numpy(), part.labels.numpy()) for part in source[:2]]
    return [*splits, source.class_names, source.sha256]


def receive(inputs: Inputs, config: TrialConfig, context: RunContext, folder: Path) -> RunContext:
    """``context`` as this node has it: images in memory, weights in a file below ``folder``."""
    if config.dataset in inputs.data:
        provide(config.dataset, _source(inputs.data[config.dataset]))
    if config.model not in inputs.weights:
        return context.model_copy(update={"weights": None})
    suffix, reference = inputs.weights[config.model]
    path = folder / f"{config.model.replace('/', '_')}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: ray.get(reference).tofile(temporary))
    return context.model_copy(update={"weights": path})


@functools.lru_cache(maxsize=4)
def _source(reference: ray.ObjectRef) -> Source:
    train, test, class_names, sha256 = ray.get(reference)
    return Source(_split(train), test and _split(test), class_names, sha256)


def _split(arrays: tuple[np.ndarray, np.ndarray]) -> Split:
    # A copy: torch has no tensors that can't be written to, as mapped memory is.
    return Split(*(torch.as_tensor(array.copy()) for array in arrays))
