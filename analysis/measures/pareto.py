"""What nothing else beats: Pareto sets and the hypervolume that they dominate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.statistics.cells import apart_by, described, finished, named


def pareto_front(
    trials: pd.DataFrame, *, cost: str = "weights_bytes", metric: str = "test_accuracy"
) -> pd.DataFrame:
    """Cells (configuration x mode) with their mean ``metric`` and mean ``cost``.

    ``on_front`` marks, within each data set (and machine: bytes and times of different hardware
    are never ranked together, nor times of trials with more or fewer beside them), the cells that
    no other cell beats: none is at most as costly and at least as accurate, and better in one of
    the two. Cells without a cost are left out.
    """
    trials = named(trials)
    good = finished(finished(trials, metric), cost)
    apart = apart_by(good, cost)
    scope = [*apart, "dataset"]
    keys = [*apart, "configuration", "quantization"]
    grouped = good.groupby(keys, observed=True, sort=False, dropna=False)
    table = grouped.agg(score=(metric, "mean"), cost=(cost, "mean"), n=(metric, "size"))
    table = described(table.reset_index(), trials)
    table["on_front"] = False
    for _, group in table.groupby(scope, observed=True, dropna=False):
        costs = np.column_stack([group["cost"], -group["score"]])
        table.loc[group.index, "on_front"] = pareto(costs)
    return table


def pareto(costs: np.ndarray) -> np.ndarray:
    """Which rows of (n, 1 or 2) costs no other row beats, as booleans; equal rows stand together.

    A row beats another when it is at most as large in each column and smaller in one.
    """
    on_front = np.zeros(len(costs), dtype=bool)
    pairs = np.column_stack([costs[:, 0], costs[:, -1]])
    best = (math.inf, math.inf)
    for row in np.lexsort((pairs[:, 1], pairs[:, 0])):
        point = tuple(pairs[row])
        if point[1] < best[1] or point == best:
            on_front[row], best = True, point
    return on_front


def costs_of(trials: pd.DataFrame, objectives: Mapping[str, str]) -> np.ndarray:
    """(trials, objectives), all to be minimized."""
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in objectives.values()]
    return trials[list(objectives)].to_numpy("float64") * signs


def hypervolume(costs: np.ndarray, reference: Sequence[float]) -> float:
    """Area that (n, 2) costs dominate, up to ``reference``; points beyond it count nothing."""
    area, height = 0.0, float(reference[1])
    for x, y in costs[np.lexsort((costs[:, 1], costs[:, 0]))]:
        if x < reference[0] and y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area
