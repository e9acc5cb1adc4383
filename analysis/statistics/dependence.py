"""Does the cost of a mode depend on an axis of the grid: learning rate, rank, model, ...?

The cost of a mode in a configuration is its mean difference to the baseline, matched on seed. To
tell whether an axis moves it, configurations are set against each other that share everything else:
a **matched set** has one configuration per level of the axis. Within the sets the levels are
compared by the two-way layout of :mod:`analysis.statistics.two_way`, whose unit is the
configuration, as everywhere. So the other axes can do what they like, and the answer is about the
average over the settings that were tried of them, not about untried ones.

- An axis of numbers with three levels or more has a **trend**: the slope along the logarithm where
  the values are positive and span a factor of two or more, along the value else; and a test of the
  **bend**, whatever else the levels do. The line asks for one degree of freedom and sees more than
  a test of all levels at once; the bend sees what the line misses.
- Any other axis has one F-test over its levels, and the interval of the widest gap between two of
  them (Tukey-Kramer). With two levels both are the paired t-test over matched sets.

With few matched sets their error rests on a handful of numbers, and comes out far too small now and
then. The **seeds** of all configurations tell from many more trials how far chance reaches at
least. So no interval is shorter than one standard error of the seeds to each side, which raises its
coverage by two points at most; and a dependence must stand out from the seeds too: p is the larger
of that over matched sets and that over seeds (an intersection-union test, Berger 1982), at most at
its level. The widest gap has the wider interval of the two. One matched set alone has the interval
of its seeds and no p: they say nothing about other configurations.

Holm (1979) corrects over all that is asked of one mode: every axis, trend and bend. Over the modes
it does not: each has its own answer, and with few matched sets another factor would leave none.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.folder.contents import StudyError
from analysis.statistics import two_way
from analysis.statistics.axes import Axis, axes_of, configurations_of
from analysis.statistics.cells import named
from analysis.statistics.inference import Floats, holm
from analysis.statistics.pairs import (
    check,
    margin_of,
    modes_beside,
    paired_differences,
    why_unlike,
)
from analysis.statistics.two_way import Codes
from analysis.text.wording import plural

_COUNTS = ("n_levels", "n_sets", "n_configurations")
_TEXT = (
    "axis", "quantization", "baseline", "metric", "unit", "lowest", "highest", "verdict", "method",
    "note",
)  # fmt: skip
TESTS = [
    "axis", "quantization", "baseline", "metric", "n_levels", "n_sets", "n_configurations",
    "unit", "estimate", "ci_low", "ci_high", "confidence", "lowest", "highest", "gap", "gap_low",
    "gap_high", "p", "p_bend", "p_holm", "p_bend_holm", "margin", "verdict", "method", "note",
]  # fmt: skip
_NUMBERS = [name for name in TESTS if name not in (*_TEXT, *_COUNTS)]
LEVELS = [
    "axis", "quantization", "level", "place", "n_configurations", "difference", "ci_low", "ci_high",
]  # fmt: skip
POINTS = ["axis", "quantization", "level", "place", "set", "difference"]


class AxisEffects(NamedTuple):
    """Three tables of :func:`axis_effects`; differences in the metric's unit."""

    tests: pd.DataFrame
    levels: pd.DataFrame
    points: pd.DataFrame


def axis_effects(
    trials: pd.DataFrame,
    *,
    metric: str = "test_accuracy",
    baseline: str = "none",
    margin: float | None = None,
    confidence: float = 0.95,
) -> AxisEffects:
    """Whether each mode's difference to ``baseline`` depends on each axis that varies.

    ``tests`` has a row per axis and mode. ``estimate`` and its interval are the slope per ``unit``
    of a line of numbers; with ``unit`` empty, level ``highest`` minus level ``lowest``: the later
    of two minus the earlier, or the ends of the widest ``gap`` between any two. ``p`` and
    ``p_bend``, two-sided, become ``p_holm`` and ``p_bend_holm`` over the axes of the mode; verdicts
    are those of :func:`verdict`. ``levels`` has every level's mean difference over the same matched
    sets, adjusted for the configurations that a set lacks, with an interval whose error is that of
    the comparison. ``points`` are the configurations, ``set`` what they share. ``place`` is the
    number of a level, from 0. All are empty where no axis varies. Where something can't be inferred
    it is missing, and ``note`` says why. Raises ``StudyError`` as ``compare_modes`` does.
    """
    check(trials, metric, baseline, confidence)
    if margin is not None and not margin > 0:
        raise StudyError(f"margin {margin} is not positive: use e.g. 0.01 for 1 pp of accuracy")
    margin = margin_of(trials, metric) if margin is None else margin
    trials = named(trials)
    modes, costs = modes_beside(trials, baseline), _costs(trials, metric, baseline)
    planned = trials.groupby("quantization")["configuration"].nunique()
    same = {"baseline": baseline, "metric": metric, "confidence": confidence, "margin": margin}
    tests, levels, points = [], [], []
    for axis, mode in itertools.product(axes_of(trials), modes):
        about = {"axis": axis.name, "quantization": mode}
        test, means = compared(axis, costs[mode], confidence)
        left_out = _left_out(test["n_configurations"], int(planned[mode]))
        note = " ".join(filter(None, [test["note"], left_out if test["n_sets"] else ""]))
        tests.append({**about, **same, **test, "note": note})
        levels += [about | level for level in means]
        points += [about | point for point in _points(axis, costs[mode].means)]
    return AxisEffects(
        decided(pd.DataFrame(tests, columns=TESTS)),
        pd.DataFrame(levels, columns=LEVELS),
        pd.DataFrame(points, columns=POINTS),
    )


class Costs(NamedTuple):
    """Of one mode, (n,) each, in the order of the configurations: over its pairs, their seeds."""

    means: Floats
    """Mean difference, ``nan`` without a pair."""
    counts: Floats
    squares: Floats
    """Sum of the squared deviations from the mean."""

    def seed_variance(self, chosen: np.ndarray) -> tuple[float, int]:
        """Of a ``chosen`` (n,) mean, by its seeds alone, and its degrees of freedom."""
        counts = self.counts[chosen]
        freedom = int(counts.sum()) - len(counts)
        if freedom < 1:
            return float("nan"), 0
        return float(self.squares[chosen].sum() / freedom * (1 / counts).mean()), freedom


def _costs(trials: pd.DataFrame, metric: str, baseline: str) -> dict[str, Costs]:
    alike = trials.iloc[:0] if why_unlike(trials, metric) else trials
    pairs = paired_differences(alike, metric=metric, baseline=baseline)
    grouped = pairs.groupby(["quantization", "configuration"], observed=True)["difference"]
    table = pd.DataFrame(
        {"means": grouped.mean(), "counts": grouped.size(), "squares": grouped.var()}
    )
    table["squares"] = table["squares"].fillna(0) * (table["counts"] - 1)
    order = configurations_of(trials)
    found = {}
    for mode in modes_beside(trials, baseline):
        own = table[table.index.get_level_values("quantization") == mode].droplevel(0)
        own = own.reindex(order).astype("float64").fillna({"counts": 0, "squares": 0})
        found[mode] = Costs(*(own[column].to_numpy() for column in Costs._fields))
    return found


def verdict(row: Any) -> str:
    """The verdict on one row of ``tests``, alpha being 1 - ``confidence``. The first that holds:

    - ``cannot be inferred``: nothing tells how much costs differ by chance;
    - ``depends``: ``p_holm`` or ``p_bend_holm`` <= alpha;
    - ``within the margin``: the interval of the widest gap lies within +-margin, so that no two
      levels differ by as much;
    - ``undecided``: anything else. A dependence that is merely not significant ends here.
    """
    alpha = 1 - row["confidence"] + 1e-12
    if not np.isfinite(row["p"]):
        return "cannot be inferred"
    if row["p_holm"] <= alpha or row["p_bend_holm"] <= alpha:
        return "depends"
    inside = max(abs(row["gap_low"]), abs(row["gap_high"])) < row["margin"]
    return "within the margin" if inside else "undecided"


def decided(table: pd.DataFrame) -> pd.DataFrame:
    """With the p adjusted over the axes of each mode, and verdicts."""
    table = table.astype(dict.fromkeys(_NUMBERS, "float64"))
    for _, own in table.groupby("quantization"):
        adjusted = holm(own[["p", "p_bend"]].to_numpy().ravel()).reshape(-1, 2)
        table.loc[own.index, ["p_holm", "p_bend_holm"]] = adjusted
    table["verdict"] = [verdict(row) for row in table.to_dict("records")]
    text, counts = dict.fromkeys(_TEXT, "string"), dict.fromkeys(_COUNTS, "int64")
    return table.astype(text | counts)


def compared(
    axis: Axis, costs: Costs, confidence: float = 0.95
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one mode's costs say of an axis: the columns of ``tests`` that follow from them alone,
    and the rows of ``levels``. Of matched sets only; where there is none, the levels' plain means.
    """
    known = np.isfinite(costs.means)
    matched = known & np.isin(axis.sets, _sets_of_several(axis, known))
    values, sets = costs.means[matched], np.unique(axis.sets[matched], return_inverse=True)[1]
    found: dict[str, Any] = {
        "n_levels": len(axis.levels), "n_sets": int(sets.max(initial=-1)) + 1,
        "n_configurations": len(values), "unit": "", "lowest": "", "highest": "", "method": "none",
    }  # fmt: skip
    present, own = np.unique(axis.codes[matched], return_inverse=True)
    fitted = two_way.fit(values, sets, own) if len(values) else None
    if fitted is None or not fitted.connected:
        note = _why_no_set(axis, int(known.sum())) if fitted is None else _APART
        return found | {"note": note}, _plain_levels(axis, costs.means, known)
    variance, freedom = costs.seed_variance(matched)
    by_seeds = fitted._replace(variance=variance if variance > 0 else np.nan, freedom=freedom)
    if np.isfinite(fitted.variance):
        found |= _inferred(axis, present, fitted, confidence)
        found |= _against_seeds(found, _inferred(axis, present, by_seeds, confidence))
    else:
        found["note"] = _why_no_error(found["n_sets"], fitted.freedom)
        if np.isfinite(by_seeds.variance):
            fitted = by_seeds
            found |= _inferred(axis, present, by_seeds, confidence)
            found |= {"p": np.nan, "p_bend": np.nan, "method": "t over seeds"}
            found["note"] += " The interval covers the seeds, not other configurations."
    levels = _plain_levels(axis, costs.means, np.zeros(len(known), dtype=bool))
    for place, row in zip(present, _fitted_levels(fitted, by_seeds, confidence), strict=True):
        levels[place] |= row | {"n_configurations": int((own == place).sum())}
    return found, levels


def _against_seeds(found: dict[str, Any], seeds: dict[str, Any]) -> dict[str, Any]:
    """What matched sets ``found``, with what the ``seeds`` say where they are known."""
    lucky = (found["ci_low"] > 0 or found["ci_high"] < 0) and seeds["ci_low"] < 0 < seeds["ci_high"]
    return {
        "p": float(np.fmax(found["p"], seeds["p"])),
        "p_bend": float(np.fmax(found["p_bend"], seeds["p_bend"])),
        "ci_low": float(np.fmin(found["ci_low"], found["estimate"] - seeds["error"])),
        "ci_high": float(np.fmax(found["ci_high"], found["estimate"] + seeds["error"])),
        "gap_low": float(np.fmin(found["gap_low"], seeds["gap_low"])),
        "gap_high": float(np.fmax(found["gap_high"], seeds["gap_high"])),
        "note": _LUCKY if lucky else "",
    }


def _sets_of_several(axis: Axis, known: np.ndarray) -> np.ndarray:
    """The sets in which two levels or more are known."""
    cells = np.unique(np.column_stack([axis.sets[known], axis.codes[known]]), axis=0)
    sets, counts = np.unique(cells[:, 0], return_counts=True)
    return sets[counts > 1]


def _inferred(
    axis: Axis, present: Codes, fitted: two_way.TwoWay, confidence: float
) -> dict[str, Any]:
    gap = two_way.widest_gap(fitted, confidence)
    ends, unit, bend = (gap.low, gap.high), "", float("nan")
    if len(present) == 2:
        found = two_way.trend(fitted, np.array([0.0, 1.0]), confidence)
        ends, method = (0, 1), "paired t over matched sets"
    elif axis.places is not None:
        found = two_way.trend(fitted, axis.places[present], confidence)
        unit, bend = axis.unit, two_way.bend(fitted, axis.places[present])
        method = "slope within matched sets, t; bend: F"
    else:
        p = two_way.any_difference(fitted)
        found = two_way.Contrast(gap.estimate, gap.error, gap.interval, p)
        method = "F over matched sets; widest gap: Tukey-Kramer"
    return {
        "unit": unit, "estimate": found.estimate, "error": found.error,
        "ci_low": found.interval.low, "ci_high": found.interval.high,
        "lowest": axis.levels[present[ends[0]]], "highest": axis.levels[present[ends[1]]],
        "gap": gap.estimate, "gap_low": gap.interval.low, "gap_high": gap.interval.high,
        "p": found.p, "p_bend": bend, "method": method,
    }  # fmt: skip


def _fitted_levels(
    fitted: two_way.TwoWay, by_seeds: two_way.TwoWay, confidence: float
) -> list[dict[str, float]]:
    low, high = two_way.mean_intervals(fitted, confidence).T
    least = two_way.mean_errors(by_seeds)
    columns = (
        fitted.means,
        np.fmin(low, fitted.means - least),
        np.fmax(high, fitted.means + least),
    )
    names = ("difference", "ci_low", "ci_high")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _plain_levels(axis: Axis, means: Floats, known: np.ndarray) -> list[dict[str, Any]]:
    """Every level with the mean of its ``known`` configurations, without an interval."""
    rows = []
    for place, level in enumerate(axis.levels):
        own = means[known & (axis.codes == place)]
        mean = float(own.mean()) if len(own) else float("nan")
        row: dict[str, Any] = {"level": level, "place": place, "n_configurations": len(own)}
        rows.append(row | {"difference": mean, "ci_low": np.nan, "ci_high": np.nan})
    return rows


def _points(axis: Axis, costs: Floats) -> list[dict[str, Any]]:
    return [
        {"level": axis.levels[code], "place": int(code), "set": int(matched), "difference": cost}
        for code, matched, cost in zip(axis.codes, axis.sets, costs.tolist(), strict=True)
        if np.isfinite(cost)
    ]


_LUCKY = (
    "The matched sets agree more closely than their seeds do, by luck: interval and p go by the "
    "seeds."
)
_APART = "The matched sets fall into groups that share no level: nothing compares all levels."


def _why_no_set(axis: Axis, known: int) -> str:
    if not len(_sets_of_several(axis, np.ones(len(axis.sets), dtype=bool))):
        return "No two configurations of the plan differ in this axis alone."
    return (
        f"No two of the {plural(known, 'configuration')} with a finished pair differ in this axis "
        "alone."
    )


def _why_no_error(sets: int, freedom: int) -> str:
    if sets == 1:
        return (
            "One matched set: nothing tells how much its levels would differ in another one. It "
            "takes a second value of another axis."
        )
    if freedom < 1:
        return "The matched sets share too few levels to tell chance from dependence."
    return "The matched sets agree exactly: without spread there is no interval and no test."


def _left_out(used: int, planned: int) -> str:
    if used == planned:
        return ""
    return (
        f"{planned - used} of {plural(planned, 'configuration')} left out: no finished pair, or no "
        "partner that differs in this axis alone."
    )
