"""The axes of a grid, their levels in order, and which configurations differ in one axis alone.

Columns that tell the configurations apart in the same way are one axis, such as a rank and an alpha
that grows with it: no analysis can separate them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.statistics.cells import named, varying
from analysis.statistics.inference import Floats
from analysis.statistics.two_way import Codes
from analysis.text.wording import axis_in_words, level_in_words


class Axis(NamedTuple):
    """An axis of the grid, with its levels in order: numbers by size, others as planned."""

    name: str
    """In words: "learning rate"."""
    levels: list[str]
    places: Floats | None
    """(L,) where the levels lie on a line; ``None`` for names."""
    unit: str
    """One unit of ``places``: "per tenfold"."""
    codes: Codes
    """(n,) the level of each configuration, in the order of :func:`configurations_of`."""
    sets: Codes
    """(n,) a number for those that share every other axis, a matched set."""


def configurations_of(trials: pd.DataFrame) -> list[str]:
    """Every planned configuration once, as planned."""
    return [str(name) for name in named(trials)["configuration"].unique()]


def axes_of(trials: pd.DataFrame) -> list[Axis]:
    """Every axis that varies over the planned configurations, those that move together as one."""
    columns = varying(trials)
    table = named(trials).drop_duplicates("configuration")[columns]
    together: dict[tuple[int, ...], list[str]] = {}
    for name in columns:
        together.setdefault(tuple(_codes(table, [name])), []).append(name)
    axes = []
    for code, names in together.items():
        others = [name for name in columns if name not in names]
        axes.append(_axis(table[names], np.array(code), _codes(table, others)))
    return axes


def _codes(table: pd.DataFrame, columns: list[str]) -> Codes:
    """(n,) the same number for rows that agree on all ``columns``, in order of appearance."""
    if not columns:
        return np.zeros(len(table), dtype=np.intp)
    grouped = table.groupby(columns, dropna=False, sort=False, observed=True)
    numbers: Codes = grouped.ngroup().to_numpy().astype(np.intp)
    return numbers


def _axis(table: pd.DataFrame, codes: Codes, sets: Codes) -> Axis:
    levels = table.iloc[np.unique(codes, return_index=True)[1]]
    places, unit = None, ""
    first = levels.iloc[:, 0]
    if _is_number(first):
        order = np.argsort(first.to_numpy("float64"), kind="stable")
        levels, codes = levels.iloc[order], np.argsort(order)[codes]
        places, unit = _line(first.to_numpy("float64")[order])
    words = [" / ".join(map(level_in_words, row)) for row in levels.itertuples(index=False)]
    return Axis(axis_in_words(list(table.columns)), words, places, unit, codes, sets)


def _is_number(values: pd.Series) -> bool:
    kind = values.dtype
    number = pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)
    return bool(number and values.notna().all())


def _line(values: Floats) -> tuple[Floats, str]:
    """Where sorted, distinct ``values`` lie for a trend, and what one unit of it is called."""
    low, high = float(values[0]), float(values[-1])
    if low > 0 and high / low >= 10:
        return np.log10(values), "per tenfold"
    if low > 0 and high / low >= 2:
        return np.log2(values), "per doubling"
    return (values - low) / (high - low), f"from {level_in_words(low)} to {level_in_words(high)}"
