"""Secondary looks at all modes at once: Friedman's test and a mixed model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics.cells import CONFIGURATION
from analysis.statistics.pairs import (
    cell_keys,
    cell_means,
    cells,
    check,
    machines,
    modes_beside,
)


def friedman(trials: pd.DataFrame, *, metric: str = "test_accuracy") -> pd.DataFrame:
    """Friedman's test that all modes rank alike over configurations; ranks 1 = largest value.

    One row per mode: quantization, metric, n_configurations (complete ones only), n_modes,
    mean_rank, statistic (chi-squared, n_modes - 1 degrees of freedom), p, kendall_w (0..1,
    agreement of the configurations), method, note. Demsar (2006).
    """
    from scipy.stats import friedmanchisquare

    check(trials, metric, None, 0.95)
    modes, count = modes_beside(trials, None), machines(trials, metric)
    means = cell_means(trials if count == 1 else trials.iloc[:0], metric=metric)
    present = [mode for mode in modes if mode in means]
    values = means[present].to_numpy("float64")
    values = values[np.isfinite(values).all(axis=1)] if len(present) == len(modes) else values[:0]
    n, k = values.shape[0], len(modes)
    note = _why_not_friedman(values, k, count)
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


def _why_not_friedman(values: np.ndarray, modes: int, machine_count: int) -> str:
    if machine_count > 1:
        return "The trials ran on several machines, across which this metric is not comparable."
    if modes < 3:
        return f"Friedman's test needs three modes, there are {modes}."
    if len(values) < 2:
        return f"{len(values)} configuration(s) have a value in every mode: nothing to test."
    if (values == values[:, :1]).all():
        return "Every mode has the same values: no ranks to compare."
    return ""


def mixed_model(
    trials: pd.DataFrame,
    *,
    metric: str = "test_accuracy",
    baseline: str = "none",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Exploration: metric ~ mode + (1 | configuration) + (1 | configuration:mode) +
    (1 | configuration:seed), by REML.

    One row per mode: estimate of the difference to ``baseline``, std_error, ci_low, ci_high and p
    (Wald z, which is too optimistic for few configurations), the four standard deviations
    ``sd_*``, n_configurations, n_trials, converged, method, note. It uses unmatched trials too.
    """
    check(trials, metric, baseline, confidence)
    modes = modes_beside(trials, baseline)
    wide = cells(trials, metric, cell_keys(trials))
    long = wide.melt(ignore_index=False, value_name="y").reset_index().dropna(subset="y")
    long["group"] = long.groupby(CONFIGURATION, dropna=False).ngroup()
    long["seed"] = long.groupby([c for c in ("study", "seed") if c in long]).ngroup()
    row: dict[str, Any] = {
        "metric": metric,
        "n_configurations": long["group"].nunique(),
        "n_trials": len(long),
        "confidence": confidence,
        "method": "mixed model, REML, Wald z",
        "converged": False,
    }
    note = _why_not_mixed(long, baseline, machines(trials, metric))
    if note:
        return _mixed_table(modes, baseline, row | {"note": note}, {})
    scale = float(np.sqrt(long.groupby("group")["y"].var().mean()))
    fitted, note = _fit(long.assign(y=(long["y"] - long["y"].mean()) / scale), baseline)
    if fitted is None:
        return _mixed_table(modes, baseline, row | {"note": note}, {})
    components = dict(zip(fitted.model.exog_vc.names, np.sqrt(fitted.vcomp), strict=True))
    row |= {
        "sd_configuration": scale * float(np.sqrt(fitted.cov_re.iloc[0, 0])),
        "sd_configuration_mode": scale * float(components["mode"]),
        "sd_configuration_seed": scale * float(components["seed"]),
        "sd_residual": scale * float(np.sqrt(fitted.scale)),
        "converged": bool(fitted.converged),
        "note": note,
    }
    limits = fitted.conf_int(alpha=1 - confidence) * scale
    terms = {mode: f"mode[T.{mode}]" for mode in modes if f"mode[T.{mode}]" in fitted.params}
    estimates = {
        mode: {
            "estimate": scale * float(fitted.params[term]),
            "std_error": scale * float(fitted.bse[term]),
            "ci_low": float(limits.loc[term].iloc[0]),
            "ci_high": float(limits.loc[term].iloc[1]),
            "p": float(fitted.pvalues[term]),
        }
        for mode, term in terms.items()
    }
    return _mixed_table(modes, baseline, row, estimates)


def _why_not_mixed(long: pd.DataFrame, baseline: str, machine_count: int) -> str:
    if machine_count > 1:
        return "The trials ran on several machines, across which this metric is not comparable."
    if baseline not in set(long["quantization"]):
        return f"No {baseline} trial ended well."
    if long["quantization"].nunique() < 2:
        return "Only one mode has trials that ended well."
    if long["group"].nunique() < 5:
        return f"{long['group'].nunique()} configuration(s) are too few for random effects."
    if long.groupby(["group", "quantization"]).size().max() < 2:
        return "One seed: configuration x mode and the seed's own spread can't be told apart."
    within = long["y"] - long.groupby("group")["y"].transform("mean")
    if np.ptp(within.to_numpy()) <= 1e-12 * float(long["y"].abs().max()):
        return "Within each configuration every trial has the same value."
    return ""


def _fit(long: pd.DataFrame, baseline: str) -> tuple[Any, str]:
    """The fit and what statsmodels warned of, or ``None`` and why it failed.

    Powell, on values scaled to about 1: with the default optimizers statsmodels 0.15 stopped far
    below the maximum on such studies and called it converged.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    order = [baseline, *sorted(set(long["quantization"]) - {baseline})]
    data = pd.DataFrame(
        {
            "y": long["y"].to_numpy(),
            "group": long["group"].to_numpy(),
            "seed": long["seed"].to_numpy(),
            "mode": pd.Categorical(long["quantization"].astype(object), categories=order),
        }
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = MixedLM.from_formula(
                "y ~ mode",
                data,
                groups="group",
                re_formula="1",
                vc_formula={"mode": "0 + C(mode)", "seed": "0 + C(seed)"},
            )
            fitted = model.fit(reml=True, method=["powell"])
        except (np.linalg.LinAlgError, ValueError) as error:
            return None, f"The mixed model can't be fitted: {error}."
    told = sorted({str(w.message).splitlines()[0][:120] for w in caught})
    few = ["Wald z is optimistic with few configurations: exploration only."]
    return fitted, " ".join([*few, *(f"statsmodels: {text}." for text in told)])


def _mixed_table(
    modes: list[str], baseline: str, row: dict[str, Any], estimates: dict[str, dict[str, float]]
) -> pd.DataFrame:
    columns = [
        "quantization", "baseline", "metric", "n_configurations", "n_trials", "estimate",
        "std_error", "ci_low", "ci_high", "confidence", "p", "sd_configuration",
        "sd_configuration_mode", "sd_configuration_seed", "sd_residual", "converged", "method",
        "note",
    ]  # fmt: skip
    rows = [
        {"quantization": mode, "baseline": baseline, **row, **estimates.get(mode, {})}
        for mode in modes
    ]
    table = pd.DataFrame(rows, columns=columns)
    numbers = [c for c in columns if c.startswith(("sd_", "ci_"))] + ["estimate", "std_error", "p"]
    return table.astype(dict.fromkeys(numbers, "float64"))
