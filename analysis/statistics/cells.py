"""Treatments, configurations, and the cells (configuration x treatment) that trials fill.

The table's column ``quantization`` is the treatment; ``configuration`` is the one key of the unit
of inference, whatever the grid varies. All that pairs, averages or groups goes by these two.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.folder.configurations import named, told_by, varying
from tune_study.folder import names, schema

__all__ = [
    "NOT_RECORDED", "TIMED", "apart_by", "cells", "counts_on_device", "described", "finished",
    "machine_of", "machines_of", "modes_of", "named", "pooled_sd", "seed_spread", "told_by",
    "units", "varying",
]  # fmt: skip


TIMED = {"train_time_s", "train_energy_j", "eval_time_s", "epoch_time_s", "images_per_s"}
"""Trials that share a device hold each other up: these are of trials with as many beside them."""

NOT_RECORDED = "not recorded"


def modes_of(column: pd.Series) -> list[str]:
    """Each treatment once: modes as the schema orders them, then settings within one, by name."""
    # unique() first: walking an arrow-backed column row by row takes longer than the statistics.
    return names.in_order({str(mode) for mode in column.dropna().unique()})


def finished(trials: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """The trials that ended well; with a ``metric``, those in which it is finite, as a float."""
    good = trials[trials["status"].isin(schema.GOOD_STATUSES)]
    if metric is None:
        return good
    value = good[metric].astype("float64")
    return good.assign(**{metric: value})[np.isfinite(value.to_numpy())]


def cells(trials: pd.DataFrame, metric: str = "test_accuracy") -> pd.DataFrame:
    """One row per (configuration, mode): n, mean, sd, min and max of ``metric`` over its seeds."""
    trials = named(trials)
    keys = [*machine_of(trials), "configuration", "quantization"]
    grouped = finished(trials, metric).groupby(keys, observed=True, sort=False)[metric]
    table = grouped.agg(n="size", mean="mean", sd="std", min="min", max="max").reset_index()
    return described(table, trials)


def units(trials: pd.DataFrame) -> pd.DataFrame:
    """A row per ``configuration``: the columns that tell it, and its name; sorted by the former."""
    trials = named(trials)
    told = told_by(trials)
    table = trials[[*told, "configuration"]].drop_duplicates("configuration")
    return table.sort_values(told, kind="stable", ignore_index=True)


def described(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """``table``, with the columns that tell its ``configuration`` in ``trials`` before it."""
    about = units(trials)
    place = pd.Index(about["configuration"]).get_indexer(pd.Index(table["configuration"]))
    columns = about.iloc[place].set_axis(table.index)
    return pd.concat([columns, table.drop(columns="configuration")], axis=1)


def machine_of(trials: pd.DataFrame) -> list[str]:
    """The column that keeps hardware apart, where the table has it."""
    return ["machine"] if "machine" in trials else []


def apart_by(trials: pd.DataFrame, metric: str) -> list[str]:
    """The columns that a ``metric`` of the hardware is never compared across."""
    shared = ["trials_on_device"] if metric in TIMED and "trials_on_device" in trials else []
    return [*machine_of(trials), *shared]


def counts_on_device(trials: pd.DataFrame, metric: str) -> list[str]:
    """How many trials shared a device, in words, of those that have ``metric``; each once."""
    if "trials_on_device" not in trials:
        return []
    found = finished(trials, metric)["trials_on_device"]
    known = [str(count) for count in sorted(found.dropna().unique())]
    return [*known, NOT_RECORDED] if found.isna().any() else known


def machines_of(trials: pd.DataFrame) -> list[str]:
    """The hardware that ran any of the trials, in words."""
    ran = trials[trials["status"] != "pending"]
    return [str(name) for name in ran["machine"].dropna().unique()] if "machine" in ran else []


def seed_spread(trials: pd.DataFrame, metric: str = "test_accuracy") -> pd.DataFrame:
    """Each finished trial's deviation from the mean of its cell, for cells of two seeds or more.

    Columns: ``configuration, quantization, seed, deviation`` (fraction) and ``n``, the seeds of
    its cell.
    """
    good = finished(named(trials), metric)
    keys = [*machine_of(good), "configuration", "quantization"]
    grouped = good.groupby(keys, observed=True, dropna=False)[metric]
    table = good.loc[:, [*keys, "seed"]].assign(
        deviation=good[metric] - grouped.transform("mean"), n=grouped.transform("size")
    )
    return table[table["n"] >= 2].reset_index(drop=True)


def pooled_sd(spread: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over seeds per mode, pooled over cells, with its degrees of freedom."""
    rows = []
    for mode, group in spread.groupby("quantization", observed=True, sort=False):
        # Each trial carries 1/n of its cell's one lost degree of freedom.
        freedom = len(group) - float((1 / group["n"]).sum())
        squares = float((group["deviation"] ** 2).sum())
        rows.append({"quantization": mode, "sd": (squares / freedom) ** 0.5, "df": round(freedom)})
    return pd.DataFrame(rows, columns=["quantization", "sd", "df"])
