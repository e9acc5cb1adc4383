"""Friedman's test against scipy."""

from __future__ import annotations

import pandas as pd
import pytest
from scipy import stats

from analysis.folder.configurations import SHORT
from analysis.statistics import exploration
from tests import synthetic
from tests.analysis.statistics.made import study


def test_friedman_is_scipys_over_configuration_means() -> None:
    trials, _ = synthetic.study_frames(effects={"nf4": -0.005})
    got = exploration.friedman(trials)
    means = trials.groupby([*SHORT, "quantization"])["test_accuracy"].mean().unstack()
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
