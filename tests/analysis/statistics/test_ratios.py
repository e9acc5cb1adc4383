"""Ratios of scores, errors and bits against hand-computed values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.folder.configurations import SHORT
from analysis.statistics import pairs, ratios
from analysis.statistics.comparison import compare_modes
from tests import synthetic
from tests.analysis.statistics.made import made
from tests.analysis.studies import only

TINY = ("deit_tiny_patch16_224",)


def test_our_ratios_are_geometric_means_over_configurations() -> None:
    trials, _ = synthetic.study_frames(effects={"nf4": -0.01}, rng_seed=3)
    row = only(ratios.our_ratios(trials), quantization="nf4", quantity="score ratio")
    wide = trials.pivot_table(
        index=[*SHORT, "seed"], columns="quantization", values="test_accuracy"
    )
    logs = np.log(wide["nf4"] / wide["none"]).groupby(list(SHORT)).mean()
    low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
    assert (row["n_configurations"], row["n_pairs"]) == (12, 36)
    assert row["ratio"] == pytest.approx(math.exp(logs.mean()))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((math.exp(low), math.exp(high)))


def test_planted_loss_is_recovered_in_all_three_ratios() -> None:
    cells = synthetic.plan(datasets=("cifar100",))
    trials, _ = synthetic.study_frames(
        cells, effects={"nf4": -0.05}, seed_sd=0, configuration_sd=0, shared_sd=0
    )
    table = ratios.our_ratios(trials)
    base = trials.loc[trials["quantization"] == "none", "test_accuracy"]
    expected = {
        "score ratio": stats.gmean((base - 0.05) / base),
        "error ratio": stats.gmean((1 - base + 0.05) / (1 - base)),
        "chance-corrected ratio": stats.gmean((base - 0.05 - 0.01) / (base - 0.01)),
    }
    for quantity, value in expected.items():
        row = only(table, quantization="nf4", quantity=quantity)
        assert row["ratio"] == pytest.approx(value)


def test_only_matched_pairs_count() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8), (8, 16)))
    lost = next(
        i for i, c in enumerate(cells) if c["quantization"]["mode"] == "none" and c["seed"] == 42
    )
    trials, _ = synthetic.study_frames(cells, failures={lost: "oom"})
    row = only(ratios.our_ratios(trials), quantization="int8", quantity="score ratio")
    assert (row["n_configurations"], row["n_pairs"]) == (2, 5)


def test_one_configuration_gets_an_interval_over_seeds_and_says_so() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),))
    trials, _ = synthetic.study_frames(cells)
    row = only(ratios.our_ratios(trials), quantization="nf4", quantity="score ratio")
    assert "seeds" in row["method"]
    assert "one configuration" in row["note"]
    assert row["ci_low"] < row["ratio"] < row["ci_high"]


def test_one_pair_gets_no_interval_and_none_gets_nothing() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(42,))
    trials, _ = synthetic.study_frames(cells, failures={1: "error"})
    one = only(ratios.our_ratios(trials), quantization="nf4", quantity="score ratio")
    assert np.isnan(one["ci_low"])
    assert "one pair" in one["note"]
    nothing = only(ratios.our_ratios(trials), quantization="int8", quantity="score ratio")
    assert np.isnan(nothing["ratio"])
    assert nothing["n_pairs"] == 0
    assert "no pair" in nothing["note"]


def test_ratios_without_spread_get_no_interval() -> None:
    rows = [(r, mode, 1, 0.8) for r in (1, 2, 3) for mode in ("none", "nf4")]
    row = only(ratios.our_ratios(made(rows)), quantization="nf4", quantity="score ratio")
    assert row["ratio"] == 1
    assert np.isnan(row[["ci_low", "ci_high"]].astype(float)).all()
    assert "without spread" in row["note"]


def test_perfect_scores_have_no_error_ratio() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),))
    trials, _ = synthetic.study_frames(cells)
    trials.loc[trials["quantization"] == "none", "test_accuracy"] = 1.0
    row = only(ratios.our_ratios(trials), quantization="nf4", quantity="error ratio")
    assert np.isnan(row["ratio"])
    assert "3 pair(s) left out" in row["note"]


def test_speed_is_paired_on_one_machine() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    trials, _ = synthetic.study_frames(cells)
    trials["machine"] = np.where(trials["quantization"] == "int8", "a", "b")
    table = ratios.metric_ratios(trials, metric="images_per_s")
    assert only(table, quantization="int8")["n_pairs"] == 0
    assert only(table, quantization="nf4")["ratio"] == pytest.approx(375 / 450)


def test_speed_is_paired_among_trials_with_as_many_beside_them() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    trials, _ = synthetic.study_frames(cells)
    assert trials["trials_on_device"].isna().all()  # as in a study from before it was recorded
    before = ratios.metric_ratios(trials, metric="images_per_s")
    assert only(before, quantization="nf4")["n_pairs"] == 9
    one, eight = trials["seed"] == 42, trials["seed"] == 123
    trials.loc[one, "trials_on_device"] = 1
    trials.loc[eight, "trials_on_device"] = 8
    trials.loc[eight, "images_per_s"] /= 5
    pd.testing.assert_frame_equal(ratios.metric_ratios(trials, metric="images_per_s"), before)
    trials.loc[one & (trials["quantization"] == "int8"), "trials_on_device"] = 8
    trials.loc[eight & (trials["quantization"] == "nf4"), "trials_on_device"] = pd.NA
    table = ratios.metric_ratios(trials, metric="images_per_s")
    assert only(table, quantization="int8")["n_pairs"] == 6
    assert only(table, quantization="nf4")["n_pairs"] == 6
    assert only(table, quantization="nf4-dq")["n_pairs"] == 9
    weights = pairs.paired_differences(trials, metric="weights_bytes")
    assert (weights["quantization"] == "int8").sum() == 9


def test_a_repeated_cell_is_averaged_as_in_the_comparison() -> None:
    """Two baselines of one cell, 0.80 and 0.90: their mean is what nf4 is set against."""
    rows = [(1, "none", 1, 0.80), (1, "none", 1, 0.90), (1, "nf4", 1, 0.85)]
    rows += [(2, "none", 1, 0.80), (2, "nf4", 1, 0.84)]
    trials = made(rows, num_classes=10)
    assert compare_modes(trials)["mean_difference"].iloc[0] == pytest.approx(0.02)
    row = only(ratios.our_ratios(trials), quantization="nf4", quantity="score ratio")
    assert row["ratio"] == pytest.approx(math.sqrt(1.0 * 1.05))
    assert row["n_pairs"] == 2
    speed = only(ratios.metric_ratios(trials, metric="test_accuracy"), quantization="nf4")
    assert speed["ratio"] == pytest.approx(row["ratio"])
