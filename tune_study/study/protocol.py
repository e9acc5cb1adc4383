"""What the trials of one study have in common: all of their settings but the axes.

Axes are model, data set, rank, alpha, quantization and seed, and whatever else a study's grid
varies. Trials that differ in more were not planned to be compared, by a slip of the hand perhaps,
so a study is extended, and studies are merged, within a protocol.
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
    """What of ``now`` leaves the protocol of ``before``, a phrase per field; empty when nothing.

    A field that has several values in ``before`` is an axis of it, and may have further ones.
    """
    known = [list(dict.fromkeys(map(repr, own))) for own in zip(*map(values, before), strict=True)]
    for trial in now:
        phrases = [
            f"{name} was {then[0]} and is {value!r}"
            for name, then, value in zip(fields(), known, values(trial), strict=bool(known))
            if len(then) == 1 and then[0] != repr(value)
        ]
        if phrases:
            return phrases
    return []
