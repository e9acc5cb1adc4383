"""What the chapter on speed says of energy, and of trials that shared a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis.chapters.costs import speed
from analysis.measures.pareto import pareto_front
from analysis.statistics.ratios import metric_ratios
from analysis.text.layout import Section
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)


@pytest.fixture
def trials() -> pd.DataFrame:
    return synthetic.study_frames(synthetic.plan(models=TINY, datasets=("cifar10",)))[0]


def chapter(trials: pd.DataFrame) -> Section:
    found: Any = SimpleNamespace(
        study=SimpleNamespace(trials=trials),
        speed=metric_ratios(trials, metric="images_per_s"),
        energy=metric_ratios(trials, metric="train_energy_j"),
        energy_front=pareto_front(trials, cost="train_energy_j"),
    )
    return speed(found)


def test_energy_is_compared_as_speed_is(trials: pd.DataFrame) -> None:
    trials.loc[trials["seed"] == 42, "train_energy_j"] *= 2  # of all modes alike
    nf4 = trials["quantization"] == "nf4"
    factors = trials["lora_r"].map({4: 0.5, 8: 1.0, 16: 2.0}).astype("float64")
    trials.loc[nf4, "train_energy_j"] *= factors[nf4]
    found = chapter(trials)
    by_key = {table.key: table for table in found.tables}
    assert list(by_key) == ["speed", "energy"]
    rows = {line[0]: line[1:] for line in by_key["energy"].rows}
    assert rows["int8"][0] == "1.50"
    # The logs differ by ln 2 from one configuration to the next: t(0.975, 2) ln 2 / sqrt 3 = 1.722.
    assert rows["nf4"] == ["1.50", "0.27 to 8.39", "3", "9"]
    assert "whatever the device took it for (a counter). Below 1 is less." in found.paragraphs[-1]
    assert found.figures == ("pareto_energy",)


def test_without_energy_the_chapter_says_why_and_shows_no_figure(trials: pd.DataFrame) -> None:
    alone = trials.assign(train_energy_j=trials["train_energy_j"].where(trials["seed"] == 42))
    alone.loc[alone["quantization"] == "none", "train_energy_j"] = float("nan")
    assert chapter(alone).paragraphs[-1] == (
        "The energy of training can't be compared: no unquantized trial has it beside a quantized "
        "one."
    )
    without = trials.assign(train_energy_j=float("nan"))
    without.loc[without["seed"] == 42, "energy_source"] = "b is readable by root alone"
    found = chapter(without)
    assert found.paragraphs[-1] == (
        "The energy of training can't be compared: a counter; b is readable by root alone."
    )
    assert [table.key for table in found.tables] == ["speed"]
    assert found.figures == ()
    earlier = without.assign(energy_source=pd.NA)
    assert chapter(earlier).paragraphs[-1].endswith("can't be compared: no trial recorded it.")


def test_the_chapter_says_how_many_trials_shared_a_device(trials: pd.DataFrame) -> None:
    alone = len(chapter(trials).paragraphs)
    assert len(chapter(trials.assign(trials_on_device=1)).paragraphs) == alone
    assert chapter(trials.assign(trials_on_device=8)).paragraphs[1] == (
        "Up to 8 trials ran on a device at a time, and held each other up: the ratios are those of "
        "trials with as many beside them; at the end of a study there were fewer."
    )
    trials.loc[trials["seed"] == 42, "trials_on_device"] = 10
    trials.loc[trials["seed"] == 123, "trials_on_device"] = 8
    assert chapter(trials).paragraphs[1] == (
        "Not all trials shared their device with as many: trials on it at a time, at most: 8, 10 "
        "and not recorded. Speed, time and energy are compared within each number, never across."
    )
    trials.loc[trials["seed"] != 42, "status"] = "error"
    assert chapter(trials).paragraphs[1].startswith("Up to 10 trials ran")
