"""What the trials of one study have in common: all of their configuration but the axes.

Trials that differ in more than model, data set, rank, alpha, quantization and seed cannot be
compared mode by mode, so a study is extended, and studies are merged, within a protocol.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tune_study.config import TrialConfig, field_names

AXES = ("model", "dataset", "lora.r", "lora.lora_alpha", "quantization", "seed")


@functools.cache
def fields() -> tuple[str, ...]:
    """The fields that make the protocol, by dotted name: ``training.learning_rate``."""
    return tuple(n for n in field_names() if n not in AXES and n.partition(".")[0] not in AXES)


def values(trial: TrialConfig) -> tuple[Any, ...]:
    """The protocol of one trial, in the order of ``fields``."""
    return tuple(functools.reduce(getattr, name.split("."), trial) for name in fields())


def difference(before: Sequence[TrialConfig], now: Sequence[TrialConfig]) -> list[str]:
    """What of ``now`` is in no protocol of ``before``, a phrase per field; empty when all is.

    A plan can hold several protocols (a grid over learning rates): the first trial that keeps none
    of them is held against the one that it comes nearest to.
    """
    known = list(dict.fromkeys(map(values, before)))
    for trial in now:
        if known and (mine := values(trial)) not in known:
            return min((_phrases(other, mine) for other in known), key=len)
    return []


def _phrases(before: Sequence[Any], now: Sequence[Any]) -> list[str]:
    return [
        f"{name} was {then!r} and is {value!r}"
        for name, then, value in zip(fields(), before, now, strict=True)
        if then != value
    ]
