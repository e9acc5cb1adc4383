"""Which trials are paired, and the means that need no test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from analysis.folder.configurations import SHORT
from analysis.statistics import comparison, pairs
from tests import synthetic
from tests.analysis.statistics.made import made, one, study


def test_pairs_are_those_of_a_slow_search() -> None:
    trials, _ = synthetic.study_frames(failures={0: "oom", 4: "error", 30: "pending"})
    got = pairs.paired_differences(trials)
    slow = []
    good = trials[trials["status"] == "completed"].to_dict("records")
    for a, b in itertools.product(good, good):
        keys = ("model", "dataset", "lora_r", "lora_alpha", "seed")
        if b["quantization"] == "none" != a["quantization"] and all(a[k] == b[k] for k in keys):
            slow.append((a["lora_r"], a["seed"], a["test_accuracy"] - b["test_accuracy"]))
    rows = got[["lora_r", "seed", "difference"]].astype(float)
    assert np.array(sorted(rows.to_numpy().tolist())) == pytest.approx(np.array(sorted(slow)))
    assert len(got) == 36 * 3 - 3 - 2  # one lost baseline, two lost partners


def test_trials_that_failed_or_have_no_value_are_not_paired() -> None:
    table = study({"nf4": [0.01, 0.02, 0.03, 0.05]})
    table.loc[table["lora_r"] == 0, "status"] = ["completed", "diverged"]
    table.loc[(table["lora_r"] == 1) & (table["quantization"] == "none"), "test_accuracy"] = np.nan
    table.loc[(table["lora_r"] == 2) & (table["quantization"] == "nf4"), "test_accuracy"] = np.inf
    got = pairs.paired_differences(table)
    assert got["difference"].tolist() == pytest.approx([0.05])
    assert "3 of 4 planned pairs lack" in one(comparison.compare_modes(table))["note"]


def test_seeds_that_do_not_match_are_no_pair() -> None:
    table = made([(1, "none", 1, 0.5), (1, "nf4", 2, 0.6), (2, "none", 1, 0.5), (2, "nf4", 1, 0.4)])
    assert pairs.paired_differences(table)["lora_r"].tolist() == [2]


def test_margins_by_metric_and_data() -> None:
    table = study({"nf4": [0.0, 0.01]})
    assert pairs.margin_of(table, "test_accuracy") == 0.01
    assert pairs.margin_of(table.assign(dataset="cifar10"), "val_accuracy") == 0.005
    assert pairs.margin_of(table, "images_per_s") is None


def test_seed_intervals_are_scipys() -> None:
    trials, _ = synthetic.study_frames()
    got = pairs.seed_intervals(trials, confidence=0.9)
    assert not any(column.startswith("p_") or column == "p" for column in got)
    differences = pairs.paired_differences(trials)
    keys = [*SHORT, "quantization"]
    for key, own in differences.groupby(keys):
        row = got.set_index(keys).loc[key]
        expected = stats.ttest_1samp(own["difference"], 0).confidence_interval(0.9)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected))
        assert row["n_seeds"] == 3
    same = pairs.seed_intervals(study({"nf4": [0.0, 0.0]}, seeds=2))
    assert same["ci_low"].isna().all()
    assert same["note"].str.contains("agree exactly").all()


def test_cell_means() -> None:
    trials, _ = synthetic.study_frames(failures={0: "oom"})
    good = trials[trials["status"] == "completed"]
    cells = pairs.cell_means(trials).set_index(list(SHORT))
    slow = good.groupby([*SHORT, "quantization"])["test_accuracy"].mean()
    for key, value in slow.items():
        assert cells.loc[key[:-1], key[-1]] == pytest.approx(value)
