"""What it would take to decide a comparison that is still open."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from scipy.special import stdtrit

from analysis.statistics.pairs import paired_differences

CONFIDENCE, POWER = 0.95, 0.8
_MOST_SEEDS, _MOST_CONFIGURATIONS = 50, 500


class More(NamedTuple):
    """What it would take to decide: more seeds, else more configurations, else neither helps."""

    seeds: int | None
    configurations: int | None
    note: str = ""


def more_needed(trials: pd.DataFrame, mode: str, loss: float) -> More:
    """Seeds (else configurations) until a one-sided test at ``-loss`` decides, if nothing changes.

    The variance of a configuration's mean difference is tau^2 + sigma^2 / seeds, tau^2 between
    configurations and sigma^2 between seeds, both estimated by moments. Wanted is the smallest
    number with (t_confidence + t_power) * sqrt(variance / configurations) < |mean + loss|: an 80 %
    chance if the difference stays as observed, a rough plan and not a promise.
    """
    pairs = paired_differences(trials)
    pairs = pairs[pairs["quantization"] == mode]
    grouped = pairs.groupby("configuration", sort=False)["difference"]
    means, counts = grouped.mean(), grouped.size()
    if not len(means):
        return More(None, None, "has no finished pair yet")
    if len(means) < 2:
        why = "needs other configurations too: another model, data set, rank or setting"
        return More(None, None, why)
    freedom = int((counts - 1).sum())
    within = float((grouped.var(ddof=1).fillna(0) * (counts - 1)).sum() / freedom) if freedom else 0
    seeds = float(counts.mean())
    total = float(means.var(ddof=1))
    between = max(0.0, total - within / seeds)
    distance = abs(float(means.mean()) + loss)

    def clears(number_of_seeds: float, configurations: int) -> bool:
        t = stdtrit(configurations - 1, CONFIDENCE) + stdtrit(configurations - 1, POWER)
        variance = between + within / number_of_seeds
        return bool(t * (variance / configurations) ** 0.5 < distance)

    # Without replicates the two variances can't be told apart, and seeds can't be planned.
    for more in range(1, _MOST_SEEDS + 1) if freedom else ():
        if clears(seeds + more, len(means)):
            return More(more, None)
    for more in range(1, _MOST_CONFIGURATIONS + 1):
        if clears(seeds, len(means) + more):
            return More(None, more)
    return More(None, None, "lies too close to this tolerance for any sensible number of trials")
