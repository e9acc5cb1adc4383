"""Inference about one mean from a handful of independent values, as functions of an array.

The values are configuration means of paired differences (see ``pairs``).
Every function takes a float array of shape (n,) without missing values. ``nan`` comes back where
nothing can be inferred; the caller says why. Only numpy and scipy.special, which load fast.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri, stdtr, stdtrit

Floats = npt.NDArray[np.float64]
EXACT_LIMIT = 16
"""Up to so many values all 2^n sign flips are enumerated."""
DRAWS = 9_999
"""Random flips and bootstrap resamples."""
DRAWS_OF_MANY = 999
"""The same beyond 1,000 values, where normal theory, permutation and bootstrap hardly differ."""
_CHUNK = 4_000_000


class Interval(NamedTuple):
    """Limits in the unit of the values; ``nan`` when there are none."""

    low: float
    high: float


def is_constant(values: Floats) -> bool:
    """No spread beyond rounding, so that no variance can be estimated."""
    scale = max(float(np.abs(values).max(initial=0.0)), np.finfo(float).tiny)
    return float(np.ptp(values)) <= 1e-12 * scale if len(values) else True


def standard_error(values: Floats) -> float:
    """sd / sqrt(n) of the mean; ``nan`` for n < 2 or without spread."""
    if len(values) < 2 or is_constant(values):
        return float("nan")
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def t_interval(values: Floats, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean, n - 1 degrees of freedom."""
    reach = stdtrit(max(len(values) - 1, 1), 0.5 + confidence / 2) * standard_error(values)
    mean = float(values.mean()) if len(values) else float("nan")
    return Interval(float(mean - reach), float(mean + reach))


def t_test(values: Floats, *, above: float | None = None, below: float | None = None) -> float:
    """p of Student's test of the mean: two-sided against 0, or one-sided.

    ``above=x`` is small when the mean lies above x, ``below=x`` when it lies below x.
    """
    error = standard_error(values)
    if np.isnan(error):
        return float("nan")
    mean, freedom = float(values.mean()), len(values) - 1
    if above is not None:
        return float(stdtr(freedom, -(mean - above) / error))
    if below is not None:
        return float(stdtr(freedom, (mean - below) / error))
    return float(2 * stdtr(freedom, -abs(mean) / error))


def tost(values: Floats, margin: float) -> float:
    """p of the two one-sided t-tests: small when the mean lies within +-margin.

    Schuirmann (1987). At level alpha it agrees with the (1 - 2 alpha) t-interval lying inside.
    """
    return float(np.maximum(t_test(values, above=-margin), t_test(values, below=margin)))


def sign_flip(values: Floats, rng: np.random.Generator) -> tuple[float, str]:
    """Two-sided p of the sign-flip (permutation) test of a mean of 0, and how it was found.

    All 2^n flips up to n = 16, which is exact and can't go below 2^(1-n); then random flips, with
    (1 + hits) / (1 + draws). Valid when the differences are symmetric about 0 under no effect.
    """
    n = len(values)
    if n == 0:
        return float("nan"), "none"
    observed = abs(float(values.sum())) * (1 - 1e-12)
    if n <= EXACT_LIMIT:
        # The mirror image of each flip has the same absolute sum: the first sign stays.
        flips = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)[None, :]
        sums = values[0] + (1 - 2 * (flips & 1)) @ values[1:]
        return float(np.mean(np.abs(sums) >= observed)), "exact"
    hits, draws, rows = 0, _draws(n), max(1, _CHUNK // n)
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        bits = np.frombuffer(rng.bytes(size * ((n + 7) // 8)), np.uint8).reshape(size, -1)
        negative = np.unpackbits(bits, axis=1, count=n).astype(np.float32)
        sums = values.sum() - 2 * (negative @ values.astype(np.float32))
        hits += int((np.abs(sums) >= observed).sum())
    return (1 + hits) / (1 + draws), f"{draws:,} random flips"


def _draws(n: int) -> int:
    return DRAWS if n <= 1_000 else DRAWS_OF_MANY


def wilcoxon(values: Floats) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; ``nan`` when every value is 0.

    Zeros are dropped. Values that differ by rounding alone are ties, and share their mean rank. Up
    to n = 16 it is exact, ties or not: the sign-flip test of the signed ranks.
    """
    scale = float(np.abs(values).max(initial=0.0))
    moved = np.round(values / scale, 10) if scale > 0 else values
    moved = moved[moved != 0]
    if len(moved) > EXACT_LIMIT:
        from scipy.stats import wilcoxon as signed_rank  # it takes a second to import

        return float(signed_rank(moved).pvalue)
    _, places, counts = np.unique(np.abs(moved), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return sign_flip(np.sign(moved) * ranks[places], np.random.default_rng())[0]


def bca_interval(values: Floats, rng: np.random.Generator, confidence: float = 0.95) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987).

    Resampling configuration means is the cluster bootstrap. The acceleration of a mean has a
    closed form, a = sum (x - mean)^3 / (6 (sum (x - mean)^2)^1.5), so time grows with n, not n^2.
    """
    n = len(values)
    if n < 3 or is_constant(values):
        return Interval(float("nan"), float("nan"))
    centred = values - values.mean()
    means = _resampled_means(centred, rng)
    below = float(np.mean(means < 0) + np.mean(means == 0) / 2)
    bias = ndtri(below)
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    z = bias + ndtri(np.array([0.5 - confidence / 2, 0.5 + confidence / 2]))
    levels = ndtr(bias + z / (1 - acceleration * z))
    if not np.isfinite(levels).all():
        return Interval(float("nan"), float("nan"))
    low, high = values.mean() + np.quantile(means, levels)
    return Interval(float(low), float(high))


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    n = len(values)
    draws, rows = _draws(n), max(1, _CHUNK // n)
    parts = [
        values[rng.integers(0, n, (min(rows, draws - start), n), dtype=np.int32)].mean(axis=1)
        for start in range(0, draws, rows)
    ]
    return np.concatenate(parts)


def holm(p_values: Floats) -> Floats:
    """p adjusted for the number of tests (Holm 1979); ``nan`` stays, and is not counted."""
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def cliffs_delta(values: Floats, others: Floats) -> float:
    """P(value > other) - P(value < other) over all n x m combinations (Cliff 1993), unpaired."""
    if not len(values) or not len(others):
        return float("nan")
    ordered = np.sort(others)
    smaller = np.searchsorted(ordered, values, side="left").sum()
    not_larger = np.searchsorted(ordered, values, side="right").sum()
    return float((smaller - (len(values) * len(others) - not_larger)) / len(values) / len(others))


def probability_superior(differences: Floats) -> float:
    """Share of pairs with a positive difference; a tie counts half."""
    if not len(differences):
        return float("nan")
    return float(np.mean(differences > 0) + np.mean(differences == 0) / 2)
