"""Quantized over unquantized, ours and the literature's: scores, error rates and bits per weight.

Every ratio of ours is paired on configuration (model x dataset x LoRA) and seed, averaged as a
logarithm within each configuration, and carries a t-interval over the configuration means,
transformed back. The literature's cells carry no intervals: ours is set against their range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import literature as lit
from analysis.statistics.cells import CONFIGURATION
from tune_study import schema

QUANTITIES = ("score ratio", "error ratio", "chance-corrected ratio")
RESOLUTION = 0.02
"""QLoRA's own cells differ by 1.6 to 2.1 % (standard deviation of the ratio, tables 3 and 4): a
smaller difference from them can't be resolved."""


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


def qlora_ratios(
    trials: pd.DataFrame,
    literature: lit.Literature | None = None,
    *,
    metric: str = "test_accuracy",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Our score ratio per mode beside each group of QLoRA's tables, with a verdict.

    One row per (mode of ours, group): ``quantization, group, table, n_reference, their_mean,
    their_low, their_high, their_sd, ratio, ci_low, ci_high, n_configurations, n_pairs,
    ratio_of_ratios, ratio_low, ratio_high`` (ours over the mean of theirs), ``position`` (our
    interval against their range), ``verdict`` (``comparable``, ``comparable with reservations``,
    ``not comparable``, ``none given``) and ``reason``. A mode without a figure in the paper has one
    row and an empty reference. Simulated trials get no verdict.
    """
    literature = literature or lit.load()
    reference = lit.reference_ratios(literature)
    ours = our_ratios(trials, metric=metric, confidence=confidence)
    ours = ours[ours["quantity"] == "score ratio"]
    simulated = bool(trials["simulated"].fillna(False).any())
    rows = []
    for own in ours.to_dict("records"):
        mode = own["quantization"]
        groups = reference[reference["quantization"] == mode].to_dict("records")
        if not groups:
            groups = [
                {"quantization": mode, "n": 0, "group": "", "note": _why_empty(literature, mode)}
            ]
        for group in groups:
            rows.append(_against(own, group, _our_scope(trials, mode, metric), simulated))
    return pd.DataFrame(rows, columns=list(_QLORA_COLUMNS))


_QLORA_COLUMNS = (
    "quantization", "group", "table", "models", "metric", "n_reference", "their_mean", "their_low",
    "their_high", "their_sd", "ratio", "ci_low", "ci_high", "n_configurations", "n_pairs",
    "ratio_of_ratios", "ratio_low", "ratio_high", "position", "verdict", "reason",
)  # fmt: skip


def _why_empty(literature: lit.Literature, mode: str) -> str:
    for entry in literature.empty:
        if entry["quantization"] == mode:
            return entry["why"]
    return f"QLoRA prints no figure for {mode}"


def _our_scope(trials: pd.DataFrame, mode: str, metric: str) -> dict[str, Any]:
    """What of ours bears on comparability: the baseline's score, chance and models."""
    pairs = paired_scores(trials, metric=metric)
    own = pairs[pairs["quantization"] == mode]
    return {
        "base": float(own["base"].mean()) if len(own) else np.nan,
        "chance": float(own["chance"].max()) if len(own) else np.nan,
        "models": sorted({str(name) for name in own["model"]}),
    }


def _against(
    own: dict[Any, Any], group: dict[Any, Any], scope: dict[str, Any], simulated: bool
) -> dict[str, Any]:
    theirs = float(group.get("mean", np.nan))
    low, high = float(group.get("low", np.nan)), float(group.get("high", np.nan))
    verdict, reason = _verdict(own, group, scope, simulated)
    return {
        "quantization": own["quantization"],
        "group": group["group"],
        "table": group.get("table") or "",
        "models": group.get("models", ""),
        "metric": group.get("metric", ""),
        "n_reference": int(group["n"]),
        "their_mean": theirs,
        "their_low": low,
        "their_high": high,
        "their_sd": float(group.get("sd", np.nan)),
        **{key: own[key] for key in ("ratio", "ci_low", "ci_high", "n_configurations", "n_pairs")},
        "ratio_of_ratios": own["ratio"] / theirs,
        "ratio_low": own["ci_low"] / theirs,
        "ratio_high": own["ci_high"] / theirs,
        "position": position(own["ci_low"], own["ci_high"], low, high),
        "verdict": verdict,
        "reason": reason,
    }


def position(ci_low: float, ci_high: float, low: float, high: float) -> str:
    """Where our interval lies against their range: inside, overlaps, below, above, or unknown."""
    if not np.isfinite([ci_low, ci_high, low, high]).all():
        return "no interval of ours" if np.isfinite([low, high]).all() else "no figure of theirs"
    if ci_high < low:
        return "below their range"
    if ci_low > high:
        return "above their range"
    return "inside their range" if ci_low >= low and ci_high <= high else "overlaps their range"


def _verdict(
    own: dict[Any, Any], group: dict[Any, Any], scope: dict[str, Any], simulated: bool
) -> tuple[str, str]:
    """The verdict and the sentence that carries it; see :func:`qlora_ratios`."""
    if simulated:
        return "none given", "the study is simulated"
    if not group["n"]:
        return "not comparable", group.get("note") or "the paper leaves the cell empty"
    if not own["n_pairs"]:
        return "not comparable", "no finished pair of this mode and the unquantized baseline"
    if not np.isfinite([own["ci_low"], own["ci_high"]]).all():
        return "not comparable", "one pair of ours gives no interval to set against theirs"
    if np.isnan(scope["chance"]) or scope["base"] < 2 * scope["chance"]:
        return (
            "not comparable",
            f"our baseline scores {scope['base']:.1%}, too near to chance for a ratio to mean much",
        )
    reservations = [f"theirs are language models ({group['models']}), ours {_names(scope)}"]
    if group["metric"] != "accuracy":
        reservations.append(f"their metric is {group['metric']}, ours image accuracy")
    if scope["base"] > 0.9:
        reservations.append(f"our baseline scores {scope['base']:.1%}: ratios compress near 100 %")
    if own["n_configurations"] < 2:
        reservations.append("ours is one configuration")
    theirs = group["mean"]
    if abs(own["ratio"] / theirs - 1) < RESOLUTION:
        reservations.append(
            "the difference is below about 2 %, the spread of QLoRA's own cells, "
            "so it can't be resolved"
        )
    if group["n"] == 1:
        reservations.append("theirs is one cell without an interval")
    return "comparable with reservations", "; ".join(reservations)


def _names(scope: dict[str, Any]) -> str:
    shown = scope["models"][:3]
    more = len(scope["models"]) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
