"""A secondary look at all modes at once: Friedman's test."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.statistics.cells import modes_of
from analysis.statistics.pairs import (
    cell_means,
    check,
    why_unlike,
)


def friedman(trials: pd.DataFrame, *, metric: str = "test_accuracy") -> pd.DataFrame:
    """Friedman's test that all modes rank alike over configurations; ranks 1 = largest value.

    One row per mode: quantization, metric, n_configurations (complete ones only), n_modes,
    mean_rank, statistic (chi-squared, n_modes - 1 degrees of freedom), p, kendall_w (0..1,
    agreement of the configurations), method, note. Demsar (2006).
    """
    from scipy.stats import friedmanchisquare

    check(trials, metric, None, 0.95)
    modes, unlike = modes_of(trials["quantization"]), why_unlike(trials, metric)
    means = cell_means(trials.iloc[:0] if unlike else trials, metric=metric)
    present = [mode for mode in modes if mode in means]
    values = means[present].to_numpy("float64")
    values = values[np.isfinite(values).all(axis=1)] if len(present) == len(modes) else values[:0]
    n, k = values.shape[0], len(modes)
    note = _why_not_friedman(values, k, unlike)
    statistic = p = kendall = float("nan")
    if not note:
        statistic, p = (float(x) for x in friedmanchisquare(*values.T))
        kendall = statistic / (n * (k - 1))
        if n < 5:
            note = f"chi-squared is a coarse approximation with {n} configurations."
    ranks = pd.DataFrame(-values).rank(axis=1).mean().tolist() if n else [float("nan")] * k
    return pd.DataFrame(
        {
            "quantization": modes,
            "metric": metric,
            "n_configurations": n,
            "n_modes": k,
            "mean_rank": ranks,
            "statistic": statistic,
            "p": p,
            "kendall_w": kendall,
            "method": "Friedman over configuration means",
            "note": note,
        }
    )


def _why_not_friedman(values: np.ndarray, modes: int, unlike: str) -> str:
    if unlike:
        return f"The trials ran {unlike}, across which this metric is not comparable."
    if modes < 3:
        return f"Friedman's test needs three modes, there are {modes}."
    if len(values) < 2:
        return f"{len(values)} configuration(s) have a value in every mode: nothing to test."
    if (values == values[:, :1]).all():
        return "Every mode has the same values: no ranks to compare."
    return ""
