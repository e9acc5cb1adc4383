"""What quantization changes, by paired inference over configurations.

The unit of inference is the configuration (every setting but quantization and seed), not the
trial: seeds of one configuration share its model and data, and a t-test over all pairs has two to
four times the false positives it claims. Differences are matched on configuration and seed,
averaged over the seeds, and the configuration means are the sample. Every function is pure: tables
in, tables out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.folder.contents import StudyError
from analysis.statistics import inference
from analysis.statistics.cells import named, told_by
from analysis.statistics.inference import Floats
from analysis.statistics.pairs import (
    EXACT,
    check,
    duplicates,
    margin_of,
    modes_beside,
    paired_differences,
    planned_pairs,
    why_unlike,
)
from analysis.text.wording import points

_LESS_IS_BETTER = (
    "_loss", "_bytes", "_s", "_error", "_explosions", "_vanishing_layers", "spikes", "norm_std",
    "norm_cv", "epochs_to_95", "plateau_epoch", "roughness", "_gap", "_rises",
)  # fmt: skip
_MORE_IS_BETTER = ("accuracy", "_per_s", "stability_score", "gradient_cosine")
COLUMNS = [
    "quantization", "baseline", "metric", "n_configurations", "n_pairs", "mean_difference",
    "ci_low", "ci_high", "confidence", "method", "bca_low", "bca_high", "p_sign_flip",
    "p_wilcoxon", "p_t", "p_holm", "margin", "p_noninferior", "p_tost", "verdict", "dz",
    "cliffs_delta", "p_superior", "note",
]  # fmt: skip
_TEXT = ("quantization", "baseline", "metric", "method", "verdict", "note")
_COUNTS = ("n_configurations", "n_pairs")
_NUMBERS = [name for name in COLUMNS if name not in (*_TEXT, *_COUNTS)]


def compare_modes(
    trials: pd.DataFrame,
    *,
    metric: str = "test_accuracy",
    baseline: str = "none",
    margin: float | None = None,
    confidence: float = 0.95,
    rng: np.random.Generator | None = None,
) -> pd.DataFrame:
    """Each quantization mode against ``baseline``, one row per mode, in ``metric``'s unit.

    ``mean_difference`` (mode minus baseline) is the mean of ``n_configurations`` configuration
    means over ``n_pairs`` pairs matched on seed, with its t-interval (``ci_low``, ``ci_high``, the
    primary result) and the BCa cluster bootstrap as a check. ``p_sign_flip`` (exact up to 16
    configurations), ``p_wilcoxon`` and ``p_t`` are two-sided; ``p_holm`` is ``p_t`` adjusted for
    the number of modes. With a margin, ``p_noninferior`` (not worse by the margin or more) and
    ``p_tost`` (within +-margin) are one-sided t-tests per mode, unadjusted. ``dz`` is the mean
    over the sd of the configuration means, ``cliffs_delta`` compares configuration means unpaired,
    ``p_superior`` is the share of pairs above the baseline, ties half. ``margin=None`` is
    :func:`margin_of`; ``rng`` drives bootstrap and random flips and defaults to a fixed seed.

    Verdicts are those of :func:`verdict`. Where something can't be inferred it is missing, and
    ``note`` says why. Raises ``StudyError`` for an unknown metric, baseline, margin or confidence.
    """
    check(trials, metric, baseline, confidence)
    if margin is not None and not margin > 0:
        raise StudyError(f"margin {margin} is not positive: use e.g. 0.01 for 1 pp of accuracy")
    margin = margin_of(trials, metric) if margin is None else margin
    rng = np.random.default_rng(0) if rng is None else rng
    common = _common_notes(trials, metric)
    alike = trials.iloc[:0] if why_unlike(trials, metric) else trials
    pairs = paired_differences(alike, metric=metric, baseline=baseline)
    rows = []
    for mode in modes_beside(trials, baseline):
        own = pairs[pairs["quantization"] == mode]
        by_unit = own.groupby("configuration", sort=False)
        means = by_unit[["base", "value", "difference"]].mean()
        row: dict[str, Any] = {
            "quantization": mode, "baseline": baseline, "metric": metric, "n_pairs": len(own),
            "confidence": confidence, "margin": margin,
        }  # fmt: skip
        row |= _inferred(means["difference"].to_numpy(), metric, margin, confidence, rng)
        row["cliffs_delta"] = inference.cliffs_delta(
            means["value"].to_numpy(), means["base"].to_numpy()
        )
        row["p_superior"] = inference.probability_superior(own["difference"].to_numpy())
        planned = planned_pairs(trials, mode, baseline)
        row["note"] = [*common, *_data_notes(row, planned), *row["note"]]
        rows.append(row)
    return _decided(pd.DataFrame(rows, columns=COLUMNS))


def verdict(row: Any) -> str:
    """The verdict on one row of :func:`compare_modes`, alpha being 1 - ``confidence``:

    - ``cannot be inferred``: no interval (fewer than two configurations, or no spread);
    - ``equivalent``: ``p_tost`` <= alpha, so the (1 - 2 alpha) interval lies within +-margin, be
      the difference significant or not;
    - ``worse`` / ``better``: the interval excludes 0 and ``p_holm`` <= alpha, in the direction
      that is bad / good for the metric;
    - ``not inferior``: ``p_noninferior`` <= alpha;
    - ``undecided``: anything else. A difference that is merely not significant ends here.

    The first that holds. Without a margin only the first, third and last apply.
    """
    alpha = 1 - row["confidence"] + 1e-12
    if not np.isfinite(row["ci_low"]):
        return "cannot be inferred"
    if row["p_tost"] <= alpha:
        return "equivalent"
    way = direction(row["metric"])
    if way and row["p_holm"] <= alpha and (row["ci_low"] > 0 or row["ci_high"] < 0):
        return "better" if way * row["mean_difference"] > 0 else "worse"
    return "not inferior" if row["p_noninferior"] <= alpha else "undecided"


def direction(metric: str) -> int:
    """+1 where more of ``metric`` is better, -1 where less is, 0 where that can't be said."""
    if any(metric.endswith(end) for end in _MORE_IS_BETTER):
        return 1
    return -1 if any(metric.endswith(end) for end in _LESS_IS_BETTER) else 0


def leave_one_out(trials: pd.DataFrame) -> pd.DataFrame:
    """:func:`compare_modes` without one configuration at a time: does one carry the result?

    One row per mode and omitted configuration: the columns that tell it; n_configurations,
    mean_difference, ci_low, ci_high, p_t, verdict, and ``changed``: whether the verdict is not
    that of all configurations.
    """
    trials = named(trials)
    margin = margin_of(trials, "test_accuracy")
    whole = compare_modes(trials, margin=margin).set_index("quantization")["verdict"]
    told = [*told_by(trials), "configuration"]
    kept = ["n_configurations", "mean_difference", "ci_low", "ci_high", "p_t", "verdict", "note"]
    parts = []
    for left_out in trials[told].drop_duplicates("configuration").to_dict("records"):
        others = trials[trials["configuration"] != left_out["configuration"]]
        part = compare_modes(others, margin=margin)[["quantization", *kept]]
        parts.append(part.assign(**{str(name): value for name, value in left_out.items()}))
    if not parts:
        return pd.DataFrame(columns=["quantization", *told, *kept, "changed"])
    table = pd.concat(parts, ignore_index=True)
    changed = table["verdict"] != table["quantization"].map(whole)
    return table.assign(changed=changed)[["quantization", *told, *kept, "changed"]]


def _inferred(
    means: Floats,
    metric: str,
    margin: float | None,
    confidence: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """All that follows from the configuration means of one mode's differences, shape (n,)."""
    n, nan = len(means), float("nan")
    if metric in EXACT:
        return {
            "n_configurations": n,
            "mean_difference": means.mean() if n else nan,
            "method": "none",
            "note": [f"{metric} is counted from the tensors and exact: nothing is to be inferred."],
        }
    interval = inference.t_interval(means, confidence)
    bootstrap = inference.bca_interval(means, rng, confidence)
    p_sign_flip, flips = inference.sign_flip(means, rng)
    oriented = means * (direction(metric) or 1)
    spread = means.std(ddof=1) if n > 1 and not inference.is_constant(means) else nan
    return {
        "n_configurations": n,
        "mean_difference": means.mean() if n else nan,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "method": f"t over configuration means; sign flip: {flips}" if n > 1 else "none",
        "bca_low": bootstrap.low,
        "bca_high": bootstrap.high,
        "p_sign_flip": p_sign_flip if n > 1 else nan,
        "p_wilcoxon": inference.wilcoxon(means) if n > 1 else nan,
        "p_t": inference.t_test(means),
        "p_noninferior": nan if margin is None else inference.t_test(oriented, above=-margin),
        "p_tost": nan if margin is None else inference.tost(means, margin),
        "dz": means.mean() / spread if n else nan,
        "note": _inference_notes(means, metric, 1 - confidence),
    }


def _decided(table: pd.DataFrame) -> pd.DataFrame:
    """With ``p_holm``, ``verdict`` and the notes as text."""
    table = table.astype(dict.fromkeys(_NUMBERS, "float64"))
    table["p_holm"] = inference.holm(table["p_t"].to_numpy())
    verdicts = [verdict(row) for row in table.to_dict("records")]
    notes = [
        " ".join([*row["note"], *_verdict_notes(row, word)])
        for row, word in zip(table.to_dict("records"), verdicts, strict=True)
    ]
    text, counts = dict.fromkeys(_TEXT, "string"), dict.fromkeys(_COUNTS, "int64")
    return table.assign(verdict=verdicts, note=notes).astype(text | counts)


def _common_notes(trials: pd.DataFrame, metric: str) -> list[str]:
    notes = []
    if why := why_unlike(trials, metric):
        notes.append(
            f"The trials ran {why}, across which {metric} is not comparable: select the trials of "
            "one."
        )
    if repeated := duplicates(trials, metric):
        notes.append(
            f"{repeated} trial(s) repeat another in every setting, mode and seed: they were "
            "averaged."
        )
    return notes


def _data_notes(row: dict[str, Any], planned: int) -> list[str]:
    missing = planned - row["n_pairs"]
    if planned == 0:
        return [f"No {row['baseline']} trial is planned beside this mode."]
    if missing <= 0:
        return []
    return [f"{missing} of {planned} planned pairs lack a trial that ended well and has a value."]


def _inference_notes(means: Floats, metric: str, alpha: float) -> list[str]:
    n = len(means)
    if n == 0:
        return ["No matched pair: nothing can be inferred."]
    if n == 1:
        return [
            "One configuration: its seeds tell nothing about other configurations, so there is no "
            "interval and no p-value."
        ]
    notes = []
    if inference.is_constant(means):
        notes.append(
            f"All {n} configurations differ by exactly {amount(means[0], metric)}: without spread "
            "there is no interval and no t-test."
        )
    if 2.0 ** (1 - n) > alpha:
        notes.append(f"With {n} configurations no sign-flip p can be below {2.0 ** (1 - n):g}.")
    if n == 2:
        notes.append("The bootstrap needs three configurations.")
    return notes


def _verdict_notes(row: dict[Any, Any], word: str) -> list[str]:
    alpha = 1 - row["confidence"]
    apart = row["ci_low"] > 0 or row["ci_high"] < 0
    limits = f"{amount(row['ci_low'], row['metric'])} to {amount(row['ci_high'], row['metric'])}"
    if word == "equivalent" and apart:
        return ["There is a difference (the interval excludes 0), but within the margin."]
    if word not in ("undecided", "not inferior"):
        return []
    if apart and direction(row["metric"]) == 0:
        return [f"There is a difference; whether less or more {row['metric']} is better is open."]
    if apart and row["p_holm"] > alpha:
        return [f"The interval excludes 0, but p over all modes (Holm) is {row['p_holm']:.3f}."]
    if word == "undecided":
        return [f"Undecided is not 'no effect': differences of {limits} fit the data."]
    return []


def amount(value: float, metric: str) -> str:
    """A difference in words: percentage points for an accuracy, else the plain number."""
    if metric.endswith("accuracy"):
        return points(value)
    return f"{value:+.4g}".replace("-", "−")
