"""Modes, configurations, and the cells (configuration x mode) that their trials fill."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tune_study.folder import schema

CONFIGURATION = ["model", "dataset", "lora_r", "lora_alpha"]
"""The unit of inference: every axis but quantization and seed."""


def modes_of(column: pd.Series) -> list[str]:
    """Each quantization mode once, as the schema orders them; unknown ones last."""
    # unique() first: walking an arrow-backed column row by row takes longer than the statistics.
    present = {str(mode) for mode in column.dropna().unique()}
    known = [mode for mode in schema.MODES if mode in present]
    return known + sorted(present - set(known))


def finished(trials: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """The trials that ended well; with a ``metric``, those in which it is finite, as a float."""
    good = trials[trials["status"].isin(schema.GOOD_STATUSES)]
    if metric is None:
        return good
    value = good[metric].astype("float64")
    return good.assign(**{metric: value})[np.isfinite(value.to_numpy())]


def cells(trials: pd.DataFrame, metric: str = "test_accuracy") -> pd.DataFrame:
    """One row per (configuration, mode): n, mean, sd, min and max of ``metric`` over its seeds."""
    keys = [*machine_of(trials), *CONFIGURATION, "quantization"]
    grouped = finished(trials, metric).groupby(keys, observed=True, sort=False)[metric]
    return grouped.agg(n="size", mean="mean", sd="std", min="min", max="max").reset_index()


def machine_of(trials: pd.DataFrame) -> list[str]:
    """The column that keeps hardware apart, where the table has it."""
    return ["machine"] if "machine" in trials else []


def seed_spread(trials: pd.DataFrame, metric: str = "test_accuracy") -> pd.DataFrame:
    """Each finished trial's deviation from the mean of its cell, for cells of two seeds or more.

    Columns: the configuration, ``quantization, seed, deviation`` (fraction) and ``n``, the seeds of
    its cell.
    """
    good = finished(trials, metric)
    keys = [*machine_of(good), *CONFIGURATION, "quantization"]
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
