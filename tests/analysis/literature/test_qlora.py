"""Our ratios beside QLoRA's: verdicts, and what gets none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.literature import qlora, vision
from tests import synthetic
from tests.analysis.studies import only

TINY = ("deit_tiny_patch16_224",)


def test_qlora_verdicts() -> None:
    trials, _ = synthetic.study_frames()
    table = qlora.qlora_ratios(trials)
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
    assert set(qlora.qlora_ratios(trials)["verdict"]) == {"none given"}
    assert set(vision.vision_references(trials)["verdict"]) == {"none given"}


def test_one_pair_is_not_comparable() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))
    trials, _ = synthetic.study_frames(cells)
    row = only(qlora.qlora_ratios(trials), quantization="nf4-dq", group="MMLU")
    assert row["verdict"] == "not comparable"
    assert "no interval" in row["reason"]


def test_a_baseline_near_chance_is_not_comparable() -> None:
    trials, _ = synthetic.study_frames()
    trials["test_accuracy"] *= 0.011
    trials["num_classes"] = 100
    row = only(qlora.qlora_ratios(trials), quantization="nf4-dq", group="MMLU")
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
    assert qlora.position(*ci, 0.97, 1.02) == words
