"""Friedman's test and the mixed model against scipy and the analysis of variance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.statistics import exploration
from analysis.statistics.cells import CONFIGURATION
from tests import synthetic
from tests.analysis.statistics.made import made, study


def test_friedman_is_scipys_over_configuration_means() -> None:
    trials, _ = synthetic.study_frames(effects={"nf4": -0.005})
    got = exploration.friedman(trials)
    means = trials.groupby([*CONFIGURATION, "quantization"])["test_accuracy"].mean().unstack()
    expected = stats.friedmanchisquare(*[means[mode] for mode in synthetic.MODES])
    assert got["statistic"].to_numpy() == pytest.approx(expected.statistic)
    assert got["p"].to_numpy() == pytest.approx(expected.pvalue)
    assert got["kendall_w"].to_numpy() == pytest.approx(expected.statistic / (12 * 3))
    ranks = (-means).rank(axis=1).mean()
    assert got["mean_rank"].tolist() == pytest.approx(ranks[list(synthetic.MODES)].tolist())


@pytest.mark.parametrize(
    ("table", "word"),
    [
        (study({"nf4": [0.01, 0.02, 0.03]}), "needs three modes"),
        (study({"nf4": [0.01], "int8": [0.02]}), "1 configuration"),
        (study({"nf4": [0.0, 0.0], "int8": [0.0, 0.0]}), "same values"),
    ],
)
def test_friedman_says_why_not(table: pd.DataFrame, word: str) -> None:
    got = exploration.friedman(table)
    assert got["p"].isna().all()
    assert got["note"].str.contains(word).all()


def test_mixed_model_agrees_with_the_analysis_of_variance() -> None:
    """Balanced data: REML is the ANOVA estimate, and the standard error follows from MS(c x m)."""
    trials, _ = synthetic.study_frames(
        effects={"nf4": -0.01}, configuration_sd=0.004, shared_sd=0.004, rng_seed=2
    )
    got = exploration.mixed_model(trials).set_index("quantization")
    means = trials.groupby([*CONFIGURATION, "quantization"])["test_accuracy"].mean().unstack()
    centred = means.sub(means.mean(axis=1), axis=0)
    interaction = centred - centred.mean()
    mean_square = (interaction**2).to_numpy().sum() / (11 * 3)  # of cell means over three seeds
    for mode in ("int8", "nf4", "nf4-dq"):
        assert got.loc[mode, "estimate"] == pytest.approx(
            (means[mode] - means["none"]).mean(), abs=1e-6
        )
        assert got.loc[mode, "std_error"] == pytest.approx(np.sqrt(2 * mean_square / 12), rel=0.01)
    assert got["converged"].all()
    assert got["note"].str.contains("exploration").all()


@pytest.mark.parametrize(
    ("table", "word"),
    [
        (study({"nf4": [0.01, 0.02, 0.03]}, seeds=2), "3 configuration"),
        (study({"nf4": [0.01] * 4 + [0.02] * 4}), "One seed"),
        (made([(1, "nf4", 1, 0.5)]), "No none trial"),
    ],
)
def test_mixed_model_says_why_not(table: pd.DataFrame, word: str) -> None:
    got = exploration.mixed_model(table)
    assert got["p"].isna().all()
    assert got["note"].str.contains(word).all()
