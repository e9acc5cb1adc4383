"""Our score ratios beside those of QLoRA's tables, each with a verdict: is it comparable at all?

QLoRA's cells carry no intervals: ours is set against their range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.literature import claims as lit
from analysis.statistics.pairs import paired_differences
from analysis.statistics.ratios import our_ratios, with_chance

RESOLUTION = 0.02
"""QLoRA's own cells differ by 1.6 to 2.1 % (standard deviation of the ratio, tables 3 and 4): a
smaller difference from them can't be resolved."""
_QLORA_COLUMNS = (
    "quantization", "group", "table", "models", "metric", "n_reference", "their_mean", "their_low",
    "their_high", "their_sd", "ratio", "ci_low", "ci_high", "n_configurations", "n_pairs",
    "ratio_of_ratios", "ratio_low", "ratio_high", "position", "verdict", "reason",
)  # fmt: skip
_NO_FIGURE: dict[Any, Any] = {
    **dict.fromkeys(("group", "table", "models", "metric"), ""),
    **dict.fromkeys(("mean", "low", "high", "sd"), np.nan),
    "n": 0,
}
"""In the place of a group of tables, for a mode that the paper has no figure of."""


def qlora_ratios(trials: pd.DataFrame, literature: lit.Literature | None = None) -> pd.DataFrame:
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
    ours = our_ratios(trials)
    ours = ours[ours["quantity"] == "score ratio"]
    simulated = bool(trials["simulated"].fillna(False).any())
    rows = []
    for own in ours.to_dict("records"):
        mode = own["quantization"]
        groups = reference[reference["quantization"] == mode].to_dict("records")
        for group in groups or [_NO_FIGURE | {"note": _why_empty(literature, mode)}]:
            rows.append(_against(own, group, _our_scope(trials, mode), simulated))
    return pd.DataFrame(rows, columns=list(_QLORA_COLUMNS))


def _why_empty(literature: lit.Literature, mode: str) -> str:
    for entry in literature.empty:
        if entry.quantization == mode:
            return entry.why
    return f"QLoRA prints no figure for {mode}"


def _our_scope(trials: pd.DataFrame, mode: str) -> dict[str, Any]:
    """What of ours bears on comparability: the baseline's score, chance and models."""
    pairs = with_chance(paired_differences(trials), trials)
    own = pairs[pairs["quantization"] == mode]
    return {
        "base": float(own["base"].mean()) if len(own) else np.nan,
        "chance": float(own["chance"].max()) if len(own) else np.nan,
        "models": sorted({str(name) for name in own["model"]}),
    }


def _against(
    own: dict[Any, Any], group: dict[Any, Any], scope: dict[str, Any], simulated: bool
) -> dict[str, Any]:
    low, high = group["low"], group["high"]
    verdict, reason = _verdict(own, group, scope, simulated)
    return {
        "quantization": own["quantization"],
        **{key: group[key] for key in ("group", "table", "models", "metric")},
        "n_reference": group["n"],
        **{f"their_{key}": group[key] for key in ("mean", "low", "high", "sd")},
        **{key: own[key] for key in ("ratio", "ci_low", "ci_high", "n_configurations", "n_pairs")},
        "ratio_of_ratios": own["ratio"] / group["mean"],
        "ratio_low": own["ci_low"] / group["mean"],
        "ratio_high": own["ci_high"] / group["mean"],
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


def resolved(ratio_of_ratios: float) -> bool:
    """Whether ours is further from the mean of theirs than their own cells are."""
    return abs(ratio_of_ratios - 1) >= RESOLUTION


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
    if not resolved(own["ratio"] / group["mean"]):
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
