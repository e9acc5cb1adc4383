"""Quantized over unquantized: ratios of scores, of error rates, of any positive measure.

Every ratio is paired on configuration and seed (``pairs.matched``), averaged as a logarithm within
each configuration, and carries a t-interval over the configuration means, transformed back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics.inference import is_constant, t_interval
from analysis.statistics.pairs import modes_beside, paired_differences


def with_chance(pairs: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """``pairs`` and the ``chance`` of their data set: 1 / classes, NaN where those are unknown."""
    if "num_classes" not in trials:
        return pairs.assign(chance=np.nan)
    classes = trials.groupby("dataset")["num_classes"].max().astype("float64")
    return pairs.assign(chance=1 / pairs["dataset"].map(classes.where(classes > 0)))


def our_ratios(trials: pd.DataFrame) -> pd.DataFrame:
    """Score, error and chance-corrected ratio of each quantized mode, with an interval of 95 %.

    One row per (quantization, quantity): ``n_configurations, n_pairs, ratio, ci_low, ci_high,
    method, note``. A ratio is quantized over ``none``: of the scores; of the error rates
    (1 - score); of (score - chance) with chance = 1 / classes.
    """
    pairs = with_chance(paired_differences(trials), trials)
    rows = []
    for mode in modes_beside(trials, "none"):
        own = pairs[pairs["quantization"] == mode]
        terms = {
            "score ratio": (own["value"], own["base"]),
            "error ratio": (1 - own["value"], 1 - own["base"]),
            "chance-corrected ratio": (own["value"] - own["chance"], own["base"] - own["chance"]),
        }
        for quantity, (above, below) in terms.items():
            row = {"quantization": mode, "baseline": "none", "quantity": quantity}
            rows.append(row | _geometric_mean(own, above, below))
    return pd.DataFrame(rows, columns=list(_RATIO_COLUMNS))


def metric_ratios(trials: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Ratio of any positive ``metric`` to that of ``none`` per mode, paired on one machine.

    Columns as in :func:`our_ratios`; ``quantity`` names the metric.
    """
    pairs = paired_differences(trials, metric=metric, same_machine=True)
    rows = []
    for mode in modes_beside(trials, "none"):
        own = pairs[pairs["quantization"] == mode]
        row = {"quantization": mode, "baseline": "none", "quantity": metric}
        rows.append(row | _geometric_mean(own, own["value"], own["base"]))
    return pd.DataFrame(rows, columns=list(_RATIO_COLUMNS))


_RATIO_COLUMNS = (
    "quantization", "baseline", "quantity", "n_configurations", "n_pairs", "ratio", "ci_low",
    "ci_high", "method", "note",
)  # fmt: skip


def _geometric_mean(pairs: pd.DataFrame, above: pd.Series, below: pd.Series) -> dict[str, Any]:
    """Geometric mean of ``above / below`` over configurations, with a t-interval of the logs."""
    top, bottom = above.to_numpy("float64"), below.to_numpy("float64")
    usable = (top > 0) & (bottom > 0)
    logs = pairs.loc[usable, ["configuration"]].assign(log=np.log(top[usable] / bottom[usable]))
    means = logs.groupby("configuration", sort=False)["log"].mean().to_numpy("float64")
    notes = []
    if not usable.all():
        notes.append(
            f"{int((~usable).sum())} pair(s) left out: a term is zero, negative or unknown"
        )
    values, method = means, "t over configuration means of the log ratio"
    if len(means) == 1 and len(logs) > 1:
        values, method = logs["log"].to_numpy("float64"), "t over the seeds of one configuration"
        notes.append("one configuration: the interval covers its seeds, not other models or data")
    if len(values) < 2:
        method = "none"
        notes.append("no pair" if not len(values) else "one pair: no interval can be given")
    elif is_constant(values):
        method = "none"
        notes.append("all ratios are the same: without spread there is no interval")
    interval = t_interval(values)
    return {
        "n_configurations": len(means),
        "n_pairs": len(logs),
        "ratio": float(np.exp(values.mean())) if len(values) else float("nan"),
        "ci_low": float(np.exp(interval.low)),
        "ci_high": float(np.exp(interval.high)),
        "method": method,
        "note": "; ".join(notes),
    }
