"""Ratios of scores, errors and bits against hand-computed values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis import references
from analysis.statistics import ratios
from analysis.statistics.cells import CONFIGURATION
from tests import synthetic
from tests.analysis.studies import only

TINY = ("deit_tiny_patch16_224",)


def test_our_ratios_are_geometric_means_over_configurations() -> None:
    trials, _ = synthetic.study_frames(effects={"nf4": -0.01}, rng_seed=3)
    row = only(ratios.our_ratios(trials), quantization="nf4", quantity="score ratio")
    wide = trials.pivot_table(
        index=[*CONFIGURATION, "seed"], columns="quantization", values="test_accuracy"
    )
    logs = np.log(wide["nf4"] / wide["none"]).groupby(list(CONFIGURATION)).mean()
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


def test_perfect_scores_have_no_error_ratio() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),))
    trials, _ = synthetic.study_frames(cells)
    trials.loc[trials["quantization"] == "none", "test_accuracy"] = 1.0
    row = only(ratios.our_ratios(trials), quantization="nf4", quantity="error ratio")
    assert np.isnan(row["ratio"])
    assert "3 pair(s) left out" in row["note"]


def test_qlora_verdicts() -> None:
    trials, _ = synthetic.study_frames()
    table = ratios.qlora_ratios(trials)
    mmlu = only(table, quantization="nf4-dq", group="MMLU")
    assert mmlu["verdict"] == "comparable with reservations"
    assert "language models" in mmlu["reason"]
    assert mmlu["ratio_of_ratios"] == pytest.approx(mmlu["ratio"] / mmlu["their_mean"])
    assert mmlu["position"] == "inside their range"
    empty = only(table, quantization="nf4")
    assert (empty["verdict"], empty["n_reference"]) == ("not comparable", 0)
    assert np.isnan(empty["their_mean"])
    assert np.isnan(empty["ratio_of_ratios"])
    assert "without double quantization" in empty["reason"]
    dash = only(table, quantization="nf4-dq", group="GLUE")
    assert dash["verdict"] == "not comparable"
    assert np.isnan(dash["their_mean"])


def test_simulated_trials_get_no_verdict_anywhere() -> None:
    trials, _ = synthetic.study_frames(simulated=True)
    assert set(ratios.qlora_ratios(trials)["verdict"]) == {"none given"}
    assert set(references.vision_references(trials)["verdict"]) == {"none given"}


def test_one_pair_is_not_comparable() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))
    trials, _ = synthetic.study_frames(cells)
    row = only(ratios.qlora_ratios(trials), quantization="nf4-dq", group="MMLU")
    assert row["verdict"] == "not comparable"
    assert "no interval" in row["reason"]


def test_a_baseline_near_chance_is_not_comparable() -> None:
    trials, _ = synthetic.study_frames()
    trials["test_accuracy"] *= 0.011
    trials["num_classes"] = 100
    row = only(ratios.qlora_ratios(trials), quantization="nf4-dq", group="MMLU")
    assert row["verdict"] == "not comparable"
    assert "chance" in row["reason"]


@pytest.mark.parametrize(
    ("ci", "words"),
    [
        ((0.90, 0.95), "below their range"),
        ((1.05, 1.10), "above their range"),
        ((0.98, 1.00), "inside their range"),
        ((0.90, 1.00), "overlaps their range"),
        ((math.nan, math.nan), "no interval of ours"),
    ],
)
def test_position(ci: tuple[float, float], words: str) -> None:
    assert ratios.position(*ci, 0.97, 1.02) == words


def test_speed_is_paired_on_one_machine() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    trials, _ = synthetic.study_frames(cells)
    trials["machine"] = np.where(trials["quantization"] == "int8", "a", "b")
    table = ratios.metric_ratios(trials, metric="images_per_s")
    assert only(table, quantization="int8")["n_pairs"] == 0
    assert only(table, quantization="nf4")["ratio"] == pytest.approx(375 / 450)


def test_vision_references() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY))
    table = references.vision_references(trials)
    deit = table[(table["source"] == "touvron2021deit") & (table["task"] == "CIFAR-10")].iloc[0]
    own = trials[(trials["quantization"] == "none") & (trials["dataset"] == "cifar10")]
    assert deit["our_value"] == pytest.approx(own["test_accuracy"].mean())
    assert deit["verdict"] == "comparable with reservations"
    assert "DeiT-B there" in deit["reason"]
    vtab = table[(table["task"] == "VTAB-1k CIFAR-100") & (table["method"] == "LoRA")].iloc[0]
    assert vtab["verdict"] == "not comparable"
    assert "1,000 training images there, 45,000 here" in vtab["reason"]
    imagenet = table[table["task"] == "ImageNet-1k"]
    assert set(imagenet["verdict"]) == {"not comparable"}
    loss = table[table["unit"] == "range of percentage points"].iloc[0]
    pairs = ratios.paired_scores(trials[trials["dataset"] == "cifar100"])
    dq = pairs[pairs["quantization"] == "nf4-dq"]
    assert loss["our_value"] == pytest.approx((dq["base"] - dq["score"]).mean())
    assert (loss["value"], loss["value_high"]) == (1, 2)
    assert not table["value"].isin([85.8, 93.82]).any()  # recalled, so never printed


def test_vtab_is_comparable_when_as_few_images_were_used() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar100",))
    trials, _ = synthetic.study_frames(cells)
    trials["train_images"] = 1000
    table = references.vision_references(trials)
    vtab = table[(table["task"] == "VTAB-1k CIFAR-100") & (table["method"] == "LoRA")].iloc[0]
    assert vtab["verdict"] == "comparable with reservations"
    deit = table[(table["source"] == "touvron2021deit") & (table["task"] == "CIFAR-100")].iloc[0]
    assert deit["verdict"] == "not comparable"
    assert deit["reason"] == "50,000 training images there, 1,000 here"
