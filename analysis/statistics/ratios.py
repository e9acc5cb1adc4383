"""Quantized over unquantized: ratios of scores, of error rates, of any positive measure.

Every ratio is paired on configuration (model x dataset x LoRA) and seed, averaged as a logarithm
within each configuration, and carries a t-interval over the configuration means, transformed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics.cells import CONFIGURATION
from tune_study import schema

QUANTITIES = ("score ratio", "error ratio", "chance-corrected ratio")


def paired_scores(
    trials: pd.DataFrame,
    *,
    metric: str = "test_accuracy",
    baseline: str = "none",
    same_machine: bool = False,
) -> pd.DataFrame:
    """One row per (configuration, seed, quantized mode) whose baseline trial also ended well.

    Columns: the configuration, ``seed, quantization, score, base, chance``; fractions 0..1.
    ``same_machine`` pairs within one machine only, as memory and time must be.
    """
    good = trials[trials["status"].isin(schema.GOOD_STATUSES) & trials[metric].notna()]
    good = good.assign(**{metric: good[metric].astype("float64")})
    keys = [*CONFIGURATION, "seed"]
    keys += [name for name in ("study",) if name in trials]
    keys += ["machine"] if same_machine and "machine" in trials else []
    base = good.loc[good["quantization"] == baseline, [*keys, metric]]
    base = base.rename(columns={metric: "base"}).drop_duplicates(keys)
    ours = good.loc[good["quantization"] != baseline, [*keys, "quantization", metric]]
    ours = ours.rename(columns={metric: "score"})
    if "num_classes" in good:
        classes = good["num_classes"].astype("float64")
        ours["chance"] = 1 / classes.where(classes > 0)
    else:
        ours["chance"] = np.nan
    return ours.merge(base, on=keys, how="inner")


def our_ratios(
    trials: pd.DataFrame,
    *,
    metric: str = "test_accuracy",
    baseline: str = "none",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Score, error and chance-corrected ratio of each quantized mode, with an interval.

    One row per (quantization, quantity): ``n_configurations, n_pairs, ratio, ci_low, ci_high,
    method, note``. A ratio is quantized over ``baseline``: of the scores; of the error rates
    (1 - score); of (score - chance) with chance = 1 / classes.
    """
    pairs = paired_scores(trials, metric=metric, baseline=baseline)
    modes = [m for m in schema.MODES if m in set(trials["quantization"]) and m != baseline]
    rows = []
    for mode in modes:
        own = pairs[pairs["quantization"] == mode]
        terms = {
            "score ratio": (own["score"], own["base"]),
            "error ratio": (1 - own["score"], 1 - own["base"]),
            "chance-corrected ratio": (own["score"] - own["chance"], own["base"] - own["chance"]),
        }
        for quantity, (above, below) in terms.items():
            row = {"quantization": mode, "baseline": baseline, "quantity": quantity}
            rows.append(row | _geometric_mean(own, above, below, confidence))
    return pd.DataFrame(rows, columns=list(_RATIO_COLUMNS))


def metric_ratios(
    trials: pd.DataFrame, *, metric: str, baseline: str = "none", confidence: float = 0.95
) -> pd.DataFrame:
    """Ratio of any positive ``metric`` to ``baseline`` per mode, paired on one machine.

    Columns as in :func:`our_ratios`; ``quantity`` names the metric.
    """
    pairs = paired_scores(trials, metric=metric, baseline=baseline, same_machine=True)
    rows = []
    for mode in [m for m in schema.MODES if m in set(trials["quantization"]) and m != baseline]:
        own = pairs[pairs["quantization"] == mode]
        row = {"quantization": mode, "baseline": baseline, "quantity": metric}
        rows.append(row | _geometric_mean(own, own["score"], own["base"], confidence))
    return pd.DataFrame(rows, columns=list(_RATIO_COLUMNS))


_RATIO_COLUMNS = (
    "quantization", "baseline", "quantity", "n_configurations", "n_pairs", "ratio", "ci_low",
    "ci_high", "method", "note",
)  # fmt: skip


def _geometric_mean(
    pairs: pd.DataFrame, above: pd.Series, below: pd.Series, confidence: float
) -> dict[str, Any]:
    """Geometric mean of ``above / below`` over configurations, with a t-interval of the logs."""
    top, bottom = above.to_numpy("float64"), below.to_numpy("float64")
    usable = (top > 0) & (bottom > 0)
    keys = [key for key in ("study", *CONFIGURATION) if key in pairs]
    logs = pairs.loc[usable, keys].assign(log=np.log(top[usable] / bottom[usable]))
    means = logs.groupby(keys, observed=True)["log"].mean().to_numpy("float64")
    notes = []
    if not usable.all():
        notes.append(
            f"{int((~usable).sum())} pair(s) left out: a term is zero, negative or unknown"
        )
    values, method = means, "t over configuration means of the log ratio"
    if len(means) == 1 and len(logs) > 1:
        values, method = logs["log"].to_numpy("float64"), "t over the seeds of one configuration"
        notes.append("one configuration: the interval covers its seeds, not other models or data")
    mean, low, high = t_interval(values, confidence)
    if len(values) < 2:
        method = "none"
        notes.append("no pair" if not len(values) else "one pair: no interval can be given")
    return {
        "n_configurations": len(means),
        "n_pairs": len(logs),
        "ratio": float(np.exp(mean)),
        "ci_low": float(np.exp(low)),
        "ci_high": float(np.exp(high)),
        "method": method,
        "note": "; ".join(notes),
    }


def t_interval(values: Sequence[float] | np.ndarray, confidence: float) -> tuple[float, ...]:
    """Mean and t-interval of ``values``; NaN ends under two values, NaN mean under one."""
    # scipy.stats takes half a second to import, special.stdtrit is the same quantile.
    from scipy.special import stdtrit

    data = np.asarray(values, dtype="float64")
    if not len(data):
        return (np.nan, np.nan, np.nan)
    mean = float(data.mean())
    if len(data) < 2:
        return (mean, np.nan, np.nan)
    half = float(stdtrit(len(data) - 1, 0.5 + confidence / 2)) * data.std(ddof=1) / len(data) ** 0.5
    return (mean, mean - half, mean + half)
