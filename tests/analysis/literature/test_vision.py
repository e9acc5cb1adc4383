"""Published vision figures beside ours."""

from __future__ import annotations

import pytest

from analysis.literature import vision
from analysis.statistics.pairs import paired_differences
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)


def test_vision_references() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY))
    table = vision.vision_references(trials)
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
    pairs = paired_differences(trials[trials["dataset"] == "cifar100"])
    dq = pairs[pairs["quantization"] == "nf4-dq"]
    assert loss["our_value"] == pytest.approx(-dq["difference"].mean())
    assert (loss["value"], loss["value_high"]) == (1, 2)
    assert not table["value"].isin([85.8, 93.82]).any()  # recalled, so never printed


def test_vtab_is_comparable_when_as_few_images_were_used() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar100",))
    trials, _ = synthetic.study_frames(cells)
    trials["train_images"] = 1000
    table = vision.vision_references(trials)
    vtab = table[(table["task"] == "VTAB-1k CIFAR-100") & (table["method"] == "LoRA")].iloc[0]
    assert vtab["verdict"] == "comparable with reservations"
    deit = table[(table["source"] == "touvron2021deit") & (table["task"] == "CIFAR-100")].iloc[0]
    assert deit["verdict"] == "not comparable"
    assert deit["reason"] == "50,000 training images there, 1,000 here"
