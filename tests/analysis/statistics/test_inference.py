"""Inference about one mean against scipy, statsmodels, enumeration, and its coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from analysis.statistics import inference

SAMPLES = [
    np.random.default_rng(seed).normal(mean, 0.01, n)
    for seed, (mean, n) in enumerate([(0, 12), (0.005, 12), (-0.01, 5), (0.002, 3), (0.01, 2)])
]


@pytest.mark.parametrize("values", SAMPLES)
def test_t_results_agree_with_scipy_and_statsmodels(values: np.ndarray) -> None:
    theirs = stats.ttest_1samp(values, 0)
    assert inference.t_test(values) == pytest.approx(theirs.pvalue, rel=1e-10)
    interval = theirs.confidence_interval(0.9)
    assert inference.t_interval(values, 0.9) == pytest.approx(tuple(interval), rel=1e-10)
    described = DescrStatsW(values)
    larger = described.ttest_mean(-0.01, alternative="larger")[1]
    assert inference.t_test(values, above=-0.01) == pytest.approx(larger, rel=1e-9)
    smaller = described.ttest_mean(0.02, alternative="smaller")[1]
    assert inference.t_test(values, below=0.02) == pytest.approx(smaller, rel=1e-9)
    assert inference.tost(values, 0.01) == pytest.approx(
        described.ttost_mean(-0.01, 0.01)[0], rel=1e-9
    )


@pytest.mark.parametrize("values", [*SAMPLES, np.array([1.0, 1, -1, 0, 2]), np.array([0.0, 0])])
def test_sign_flip_agrees_with_scipys_exact_permutation(values: np.ndarray) -> None:
    theirs = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    # The two-sided p of a symmetric null distribution, without scipy's doubling of the tail.
    expected = np.mean(np.abs(theirs.null_distribution) >= abs(values.sum()) * (1 - 1e-12))
    got = inference.sign_flip(values, np.random.default_rng(0))
    assert got == (pytest.approx(expected), "exact")


def test_sign_flip_of_three_seeds_cannot_go_below_a_quarter() -> None:
    assert inference.sign_flip(np.array([1.0, 2, 3]), np.random.default_rng(0))[0] == 0.25


def test_random_flips_approach_the_exact_p() -> None:
    values = np.random.default_rng(3).normal(0.5, 1, 17)
    p, how = inference.sign_flip(values, np.random.default_rng(0))
    signs = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12))
    assert how == "9,999 random flips"
    assert p == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 9_999))


def test_wilcoxon_agrees_with_enumeration() -> None:
    values = np.array([0.5, -1.0, 2.0, 3.5, 0.7, 1.1])
    ranks = stats.rankdata(np.abs(values))
    sums = [(np.array(s) * ranks).sum() for s in itertools.product([0, 1], repeat=6)]
    mine = ranks[values > 0].sum()
    centre = ranks.sum() / 2
    expected = np.mean(np.abs(np.array(sums) - centre) >= abs(mine - centre))
    assert inference.wilcoxon(values) == pytest.approx(expected)
    assert inference.wilcoxon(values) == pytest.approx(stats.wilcoxon(values).pvalue)
    assert np.isnan(inference.wilcoxon(np.zeros(4)))
    rounding = np.array([0.3, 0.1 + 0.2, -0.3, 0.3])
    assert inference.wilcoxon(rounding) == inference.wilcoxon(np.array([1.0, 1, -1, 1]))


@pytest.mark.parametrize("n", [4, 5, 10, 14, 17, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_wilcoxon_agrees_with_scipy(n: int, tied: bool) -> None:
    values = np.random.default_rng(n).normal(0.3, 1, n)
    values = np.round(values * 2) / 2 if tied else values  # ties, and zeros
    moved = values[values != 0]
    exact = len(moved) <= inference.EXACT_LIMIT
    # Of tied ranks scipy's own exact distribution is wrong: all flips, or its permutations.
    method = stats.PermutationMethod(n_resamples=2**17) if exact else "auto"
    expected = stats.wilcoxon(moved, method=method).pvalue if len(moved) else np.nan
    assert inference.wilcoxon(values) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("skewed", [False, True])
def test_bca_agrees_with_scipy(skewed: bool) -> None:
    rng = np.random.default_rng(5)
    values = rng.exponential(1, 12) if skewed else rng.normal(0, 1, 12)
    theirs = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=50_000, random_state=1
    ).confidence_interval
    mine = inference.bca_interval(values, np.random.default_rng(0))
    width = theirs.high - theirs.low
    assert mine.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert mine.high == pytest.approx(theirs.high, abs=0.03 * width)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=8))
def test_holm_agrees_with_statsmodels(p_values: list[float]) -> None:
    values = np.array(p_values, dtype=float)
    got = inference.holm(values)
    tested = ~np.isnan(values)
    assert np.isnan(got[~tested]).all()
    if tested.any():
        assert got[tested] == pytest.approx(multipletests(values[tested], method="holm")[1])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
)
def test_cliffs_delta_is_that_of_all_combinations(a: list[int], b: list[int]) -> None:
    slow = np.mean([np.sign(x - y) for x in a for y in b])
    assert inference.cliffs_delta(np.array(a, float), np.array(b, float)) == pytest.approx(slow)


def simulated_differences(
    effect: float, simulations: int, seed: int, configurations: int = 12, seeds: int = 3
) -> np.ndarray:
    """Differences (simulations, configurations, seeds) of the model of ``synthetic``."""
    rng = np.random.default_rng(seed)
    shape = (simulations, configurations, seeds)
    between = rng.normal(0, 0.004, (simulations, configurations, 1))
    return effect + between + rng.normal(0, 0.004 * np.sqrt(2), shape)


def rates(effect: float, simulations: int, seed: int) -> dict[str, float]:
    """Coverage and rejection rates of the primary interval and of the naive test over pairs."""
    differences = simulated_differences(effect, simulations, seed)
    covered = rejected = 0
    for means in differences.mean(axis=2):
        low, high = inference.t_interval(means)
        covered += low <= effect <= high
        rejected += inference.t_test(means) <= 0.05
    flat = differences.reshape(simulations, -1) - effect
    naive = np.mean(stats.ttest_1samp(flat, 0, axis=1).pvalue <= 0.05)
    return {
        "coverage": covered / simulations,
        "rejected": rejected / simulations,
        "naive": float(naive),
    }


def test_coverage_in_small() -> None:
    got = rates(-0.01, 1_000, 1)
    assert 0.93 <= got["coverage"] <= 0.97
    assert got["naive"] > 0.08  # over pairs instead of configurations: what we do not do


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "effect"), list(enumerate([-0.02, -0.01, -0.002, 0.0, 0.005])))
def test_intervals_cover_planted_effects(seed: int, effect: float) -> None:
    got = rates(effect, 20_000, seed)
    print(effect, got)
    assert 0.945 <= got["coverage"] <= 0.955
    if effect == 0:
        assert got["rejected"] <= 0.055
