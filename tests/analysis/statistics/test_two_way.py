"""The two-way layout against statsmodels and scipy; its coverage is in test_dependence.py."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from analysis.statistics import two_way


class Layout(NamedTuple):
    values: np.ndarray
    blocks: np.ndarray
    levels: np.ndarray


def layout(levels: int, blocks: int, seed: int, lost: tuple[int, ...] = ()) -> Layout:
    rng = np.random.default_rng(seed)
    cells = list(itertools.product(range(blocks), range(levels)))
    kept = np.array([cell for number, cell in enumerate(cells) if number not in lost])
    block, level = kept.T
    values = rng.normal(0, 0.02, blocks)[block] + 0.004 * level**2
    return Layout(values + rng.normal(0, 0.004, len(kept)), block, level)


LAYOUTS = [
    layout(2, 3, 0),
    layout(3, 2, 1),
    layout(4, 6, 2),
    layout(3, 4, 3, lost=(0, 7)),
    layout(4, 3, 4, lost=(1, 6, 11)),
]
PLACES = np.array([0.0, 1.0, 1.5, 4.0])


def least_squares(one: Layout, columns: np.ndarray) -> Any:
    """statsmodels' fit on a dummy per block, and ``columns``."""
    blocks = one.blocks[:, None] == np.unique(one.blocks)
    return sm.OLS(one.values, np.column_stack([blocks, columns]).astype(float)).fit()


def with_levels(one: Layout) -> Any:
    return least_squares(one, one.levels[:, None] == np.unique(one.levels)[1:])


@pytest.mark.parametrize("one", LAYOUTS)
def test_means_and_their_intervals_are_those_of_least_squares(one: Layout) -> None:
    theirs, ours = with_levels(one), two_way.fit(*one)
    assert (ours.freedom, ours.connected) == (theirs.df_resid, True)
    assert ours.variance == pytest.approx(theirs.mse_resid)
    blocks, levels = one.blocks.max() + 1, one.levels.max() + 1
    # A level's mean is what is predicted for it, averaged over all blocks alike.
    asked = np.column_stack([np.full((levels, blocks), 1 / blocks), np.eye(levels)[:, 1:]])
    told = theirs.t_test(asked)
    assert ours.means == pytest.approx(told.effect)
    assert two_way.mean_intervals(ours, 0.9) == pytest.approx(told.conf_int(0.1))
    assert ours.variance * ours.spread == pytest.approx(theirs.cov_params(r_matrix=asked))


@pytest.mark.parametrize("one", LAYOUTS)
def test_the_tests_are_the_f_tests_of_nested_models(one: Layout) -> None:
    full, ours = with_levels(one), two_way.fit(*one)
    places = PLACES[: one.levels.max() + 1]
    none = least_squares(one, np.zeros((len(one.values), 0)))
    line = least_squares(one, places[one.levels])
    assert two_way.any_difference(ours) == pytest.approx(full.compare_f_test(none)[1])
    if len(places) > 2:
        assert two_way.bend(ours, places) == pytest.approx(full.compare_f_test(line)[1])
    else:
        assert np.isnan(two_way.bend(ours, places))


@pytest.mark.parametrize("one", LAYOUTS)
def test_the_trend_is_the_slope_of_least_squares_with_the_error_of_the_layout(one: Layout) -> None:
    full, ours = with_levels(one), two_way.fit(*one)
    places = PLACES[: one.levels.max() + 1]
    line = least_squares(one, places[one.levels])
    error = line.bse[-1] * (full.mse_resid / line.mse_resid) ** 0.5
    t = stats.t(full.df_resid)
    got = two_way.trend(ours, places, 0.9)
    assert got.estimate == pytest.approx(line.params[-1])
    assert got.interval == pytest.approx((got.estimate + error * t.ppf([0.05, 0.95])).tolist())
    assert got.p == pytest.approx(2 * t.sf(abs(got.estimate) / error))


def test_with_two_levels_it_is_the_paired_t_test() -> None:
    one = layout(2, 5, 7)
    low, high = (one.values[one.levels == level] for level in (0, 1))
    theirs, ours = stats.ttest_rel(high, low), two_way.fit(*one)
    slope = two_way.trend(ours, np.array([0.0, 1.0]))
    gap = two_way.widest_gap(ours)
    interval = theirs.confidence_interval()
    assert two_way.any_difference(ours) == pytest.approx(theirs.pvalue)
    assert slope.p == pytest.approx(theirs.pvalue)
    assert slope.interval == pytest.approx(tuple(interval))
    assert gap.interval == pytest.approx(tuple(interval), rel=1e-5)
    assert (gap.low, gap.high) == (0, 1)


@pytest.mark.parametrize("one", LAYOUTS[1:])
def test_the_widest_gap_has_tukeys_interval(one: Layout) -> None:
    theirs, got = with_levels(one), two_way.widest_gap(two_way.fit(*one), 0.9)
    levels = one.levels.max() + 1
    dummies = np.eye(levels)[:, 1:]
    gaps = {}
    for low, high in itertools.permutations(range(levels), 2):
        asked = np.r_[np.zeros(one.blocks.max() + 1), dummies[high] - dummies[low]]
        told = theirs.t_test(asked)
        gaps[low, high] = (told.effect.item(), told.sd.item())
    (low, high), (estimate, sd) = max(gaps.items(), key=lambda item: item[1][0])
    reach = stats.studentized_range.ppf(0.9, levels, theirs.df_resid) * sd / 2**0.5
    assert (got.low, got.high) == (low, high)
    assert got.estimate == pytest.approx(estimate)
    assert got.interval == pytest.approx((estimate - reach, estimate + reach), rel=1e-6)


@pytest.mark.parametrize(
    ("levels", "freedom", "confidence"),
    [(2, 1, 0.95), (3, 1, 0.95), (3, 2, 0.99), (4, 6, 0.8), (14, 1, 0.95), (6, 300, 0.95)],
)
def test_the_studentized_range_is_scipys(levels: int, freedom: int, confidence: float) -> None:
    expected = stats.studentized_range.ppf(confidence, levels, freedom)
    got = two_way.studentized_range(levels, freedom, confidence)
    assert got == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_inferred_is_missing() -> None:
    alone = two_way.fit(np.array([1.0, 2, 4]), np.array([0, 0, 0]), np.array([0, 1, 2]))
    assert alone.means == pytest.approx([1, 2, 4])
    chained = two_way.fit(
        np.array([1.0, 2, 4, 4]), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])
    )  # fmt: skip
    exact = two_way.fit(
        np.array([0.1, 0.2, 0.4, 0.5]), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    )
    apart = two_way.fit(
        np.array([1.0, 2, 4, 6, 1, 3, 5, 5]),
        np.repeat(range(4), 2),
        np.array([0, 1, 0, 1, 2, 3, 2, 3]),
    )
    assert [one.freedom for one in (alone, chained, exact, apart)] == [0, 0, 1, 1]
    assert [one.connected for one in (alone, chained, exact, apart)] == [True, True, True, False]
    for one in (alone, chained, exact, apart):
        places = np.arange(len(one.means), dtype=float)
        slope, gap = two_way.trend(one, places), two_way.widest_gap(one)
        missing = [one.variance, *slope.interval, slope.p, *gap.interval]
        missing += [two_way.any_difference(one), two_way.bend(one, places)]
        assert np.isnan(missing).all()
        assert np.isnan(two_way.mean_intervals(one)).all()
