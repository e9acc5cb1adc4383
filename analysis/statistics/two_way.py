"""Do the levels of one axis differ, in blocks that share every other axis? The two-way layout.

A value y of block b and level l is taken as y = block_b + level_l + error, with independent errors
of one variance: the two-way layout without interaction (Scheffe 1959, ch. 4; with cells missing,
the intra-block analysis of an incomplete block design, John 1971, ch. 11). Blocks are fixed: only
what happens within them tells levels apart, whatever the other axes do. The error is what the
levels do differently from block to block, so one block alone says nothing. With two levels all of
this is the paired t-test over blocks. Only numpy and scipy.special, which load fast.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import fdtrc, gammaln, ndtr, stdtr, stdtrit, xlogy

from analysis.statistics.inference import Floats, Interval

Codes = npt.NDArray[np.intp]


class TwoWay(NamedTuple):
    """A fitted layout of L levels in B blocks; ``variance`` is ``nan`` where it can't be known."""

    means: Floats
    """(L,) mean of each level over all blocks, adjusted for the cells that a block lacks."""
    spread: Floats
    """(L, L) covariance of ``means`` in units of ``variance``."""
    information: Floats
    """(L, L) of the levels within blocks: the inverse covariance of their contrasts."""
    variance: float
    freedom: int
    """n - B - (L - 1)."""
    connected: bool
    """Whether the blocks lead from every level to every other."""


def fit(values: Floats, blocks: Codes, levels: Codes) -> TwoWay:
    """Least squares of ``values`` (n,) on blocks 0..B-1 and levels 0..L-1, all of them present.

    ``variance`` is ``nan`` without a degree of freedom, without a spread beyond rounding, or when
    the blocks do not connect all levels; then nothing can be inferred.
    """
    n, count, number = len(values), int(blocks.max()) + 1, int(levels.max()) + 1
    cells = np.zeros((count, number))
    np.add.at(cells, (blocks, levels), 1.0)
    sizes = cells.sum(axis=1)
    shares = cells / sizes[:, None]
    block_means = np.bincount(blocks, values) / sizes
    within = values - block_means[blocks]
    information = np.diag(cells.sum(axis=0)) - shares.T @ cells
    inverse = np.linalg.pinv(information, rcond=1e-9, hermitian=True)
    effects = inverse @ np.bincount(levels, within)
    errors = within - effects[levels] + (shares @ effects)[blocks]
    # A mean is the mean of the blocks' means, moved by the levels that each block holds.
    moves = np.eye(number) - shares.mean(axis=0)
    spread = moves @ inverse @ moves.T + (1 / sizes).sum() / count**2
    freedom = n - count - (number - 1)
    variance = float(errors @ errors) / freedom if freedom > 0 else float("nan")
    connected = bool(np.linalg.matrix_rank(information, tol=1e-9, hermitian=True) == number - 1)
    rounding = 1e-12 * float(np.abs(values).max())
    if not connected or not variance > rounding**2:
        variance = float("nan")
    means = block_means.mean() + moves @ effects
    return TwoWay(means, spread, information, variance, freedom, connected)


def mean_errors(fitted: TwoWay) -> Floats:
    """(L,) standard errors of the levels' means over these very blocks."""
    errors: Floats = np.sqrt(fitted.variance * np.diag(fitted.spread))
    return errors


def mean_intervals(fitted: TwoWay, confidence: float = 0.95) -> Floats:
    """(L, 2) t-intervals of the levels' means over these very blocks (Loftus and Masson 1994).

    Their error is that of the layout, so blocks that differ in all levels alike do not widen them.
    """
    reach = mean_errors(fitted) * stdtrit(max(fitted.freedom, 1), 0.5 + confidence / 2)
    return np.column_stack([fitted.means - reach, fitted.means + reach])


class Contrast(NamedTuple):
    """An estimate in the unit of the values, and the two-sided p that it is 0."""

    estimate: float
    error: float
    interval: Interval
    p: float


def trend(fitted: TwoWay, places: Floats, confidence: float = 0.95) -> Contrast:
    """Slope of the levels' means along ``places`` (L,), within blocks.

    The slope is that of least squares; its error is that of the layout, which leaves out how far
    the means lie off the line, so that a bend does not spoil the interval.
    """
    weight = float(places @ fitted.information @ places)
    slope = float(places @ fitted.information @ fitted.means) / weight
    error = (fitted.variance / weight) ** 0.5
    freedom = max(fitted.freedom, 1)
    reach = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    p = float(2 * stdtr(freedom, -abs(slope) / error))
    return Contrast(slope, error, Interval(slope - reach, slope + reach), p)


def any_difference(fitted: TwoWay) -> float:
    """p of the F-test that all levels are the same, L - 1 and ``freedom`` degrees of freedom."""
    explained = float(fitted.means @ fitted.information @ fitted.means)
    return _f_test(fitted, explained, len(fitted.means) - 1)


def bend(fitted: TwoWay, places: Floats) -> float:
    """p of the F-test that the means lie on a line along ``places`` (L,); ``nan`` for L < 3."""
    if len(places) < 3:
        return float("nan")
    slope = trend(fitted, places).estimate
    off = fitted.means - slope * places
    return _f_test(fitted, float(off @ fitted.information @ off), len(places) - 2)


def _f_test(fitted: TwoWay, explained: float, freedom: int) -> float:
    return float(fdtrc(freedom, max(fitted.freedom, 1), explained / freedom / fitted.variance))


class Gap(NamedTuple):
    """The two levels farthest apart: ``high`` minus ``low``, with an interval."""

    low: int
    high: int
    estimate: float
    error: float
    interval: Interval


def widest_gap(fitted: TwoWay, confidence: float = 0.95) -> Gap:
    """The largest difference of two levels' means, with Tukey's interval.

    It holds for all pairs at once, so that the choice of the largest does not spoil it: exact with
    every cell filled (Tukey 1953), a little wide otherwise (Kramer 1956; Hayter 1984). With two
    levels it is Student's.
    """
    low, high = int(np.argmin(fitted.means)), int(np.argmax(fitted.means))
    estimate = float(fitted.means[high] - fitted.means[low])
    spread = fitted.spread
    scale = fitted.variance * (spread[low, low] + spread[high, high] - 2 * spread[low, high])
    error = float(np.sqrt(scale))
    quantile = studentized_range(len(fitted.means), max(fitted.freedom, 1), confidence)
    reach = quantile * error / 2**0.5
    return Gap(low, high, estimate, error, Interval(estimate - reach, estimate + reach))


@lru_cache
def studentized_range(levels: int, freedom: int, confidence: float) -> float:
    """Quantile of the range of ``levels`` normal values over an independent sd.

    By bisection of its distribution, two integrals by Gauss-Legendre; good to 1e-6.
    """
    low, high = 0.0, 4.0
    while _range_below(high, levels, freedom) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        if _range_below(middle, levels, freedom) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _range_below(limit: float, levels: int, freedom: int) -> float:
    """P(range <= ``limit`` sds): the known-sd probability, averaged over the sd's distribution."""
    nodes, weights = _legendre()
    half = freedom / 2
    most = 1 + 9 / np.sqrt(freedom)
    sds = most * nodes
    log_density = np.log(2) + xlogy(half, half) - gammaln(half)
    log_density = log_density + xlogy(freedom - 1, sds) - half * sds**2
    lowest = -9 + 18 * nodes  # of the smallest value
    density = np.exp(-(lowest**2) / 2) / np.sqrt(2 * np.pi)
    inside = ndtr(lowest + limit * sds[:, None]) - ndtr(lowest)
    known_sd = 18 * levels * (density * inside ** (levels - 1)) @ weights
    return float(most * (np.exp(log_density) * known_sd) @ weights)


@lru_cache
def _legendre() -> tuple[Floats, Floats]:
    """Nodes and weights on 0..1."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return (nodes + 1) / 2, weights / 2
