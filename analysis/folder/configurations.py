"""The configuration of each trial of a table, as one text: what everything is grouped by."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tune_study.folder import names, schema

SHORT = tuple(names.SHORT.values())
"""The columns by which a configuration was told before every setting had one."""
FIELDS = (
    *SHORT,
    *(
        column.name
        for column in schema.SETTINGS
        if names.in_configuration(column.name) and column.name not in names.SHORT
    ),
)
"""The configuration's columns; rank and alpha under their short names."""


def varying(trials: pd.DataFrame) -> list[str]:
    """The columns of the configuration that ``trials`` has with more than one value.

    Missing is a value too: a training size of "all", for one.
    """
    return [name for name in FIELDS if name in trials and trials[name].nunique(dropna=False) > 1]


def told_by(trials: pd.DataFrame) -> list[str]:
    """The columns that tell a configuration in a table: the short ones, and what varies beside."""
    return [*SHORT, *(name for name in varying(trials) if name not in SHORT)]


def named(trials: pd.DataFrame) -> pd.DataFrame:
    """``trials`` with the column ``configuration``, where it has none or not a whole one.

    One text per configuration: what differs among those of this table. Different ones have
    different texts, so this one column can stand for all of them.
    """
    if "configuration" in trials and trials["configuration"].notna().all():
        return trials
    columns = [name for name in FIELDS if name in trials]
    by = varying(trials) or columns[:1]
    number = trials.groupby(by, dropna=False, sort=False, observed=True).ngroup().to_numpy()
    first = ~pd.Series(number).duplicated().to_numpy()
    distinct = trials.loc[first, columns].astype(object)
    distinct = distinct.where(distinct.notna(), None)
    cells: list[Any] = distinct.rename(columns=names.LONG).to_dict("records")
    texts = pd.array(names.configurations(cells), dtype="string")
    return trials.assign(configuration=texts[number] if len(trials) else texts)
