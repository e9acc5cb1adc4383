"""Curves and gradients per layer, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.measures.curves import curve_bands, curve_gaps, layer_gradients, layer_of
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)


def test_curve_bands_by_hand(frames: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    trials, epochs = frames
    table = curve_bands(epochs, trials)
    own = trials[
        (trials["model"] == TINY[0])
        & (trials["dataset"] == "cifar10")
        & (trials["quantization"] == "nf4")
    ]
    values = epochs[epochs["trial_id"].isin(own["trial_id"]) & (epochs["epoch"] == 3)]
    row = table.query(
        "model == @TINY[0] and dataset == 'cifar10' and quantization == 'nf4' and epoch == 3"
    ).iloc[0]
    assert row["n"] == len(values)
    assert row["mean"] == pytest.approx(values["val_accuracy"].mean())
    assert row["sd"] == pytest.approx(values["val_accuracy"].std())


def test_curves_end_where_most_trials_have_stopped() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), modes=("none",))
    trials, epochs = synthetic.study_frames(cells)
    short = trials["trial_id"].iloc[:2]
    epochs = epochs[~(epochs["trial_id"].isin(short) & (epochs["epoch"] > 5))]
    table = curve_bands(epochs, trials)
    assert table["epoch"].max() == 5  # of 3 trials, only one goes on


def test_curve_gaps_are_paired() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),))
    trials, epochs = synthetic.study_frames(cells)
    table = curve_gaps(epochs, trials)
    assert set(table["quantization"]) == {"int8", "nf4", "nf4-dq"}
    seeds = []
    for seed in synthetic.SEEDS:
        own = trials[trials["seed"] == seed].set_index("quantization")["trial_id"]
        at = epochs[epochs["epoch"] == 2].set_index("trial_id")["val_accuracy"]
        seeds.append(at[own["nf4"]] - at[own["none"]])
    row = table.query("quantization == 'nf4' and epoch == 2").iloc[0]
    assert row["mean"] == pytest.approx(np.mean(seeds))
    assert row["sd"] == pytest.approx(np.std(seeds, ddof=1))


def test_layer_gradients_average_over_trials(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), modes=("none",))
    path = synthetic.write_study(tmp_path / "s", cells)
    trials, _ = synthetic.study_frames(cells)
    for cell, epochs in zip(cells, ([[1, 2], [3, 4]], [[3, None]], None), strict=True):
        file = path / cell["trial_id"] / "gradients.json"
        file.write_text(
            json.dumps({"layers": ["a", "b"], "epochs": epochs}) if epochs else '{"layers": ['
        )
    table, problems = layer_gradients(path, trials)
    norms = table.pivot(index="name", columns="epoch", values="norm")
    assert norms.loc["a"].tolist() == [2, 3]
    assert norms.loc["b"].tolist() == [2, 4]
    assert len(problems) == 1
    assert cells[2]["trial_id"] in problems[0]


def test_both_lora_matrices_make_one_layer(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))[:1]
    path = synthetic.write_study(tmp_path / "s", cells)
    trials, _ = synthetic.study_frames(cells)
    stem = "base_model.model."
    names = [f"{stem}blocks.0.mlp.fc1.lora_{x}.default.weight" for x in "AB"]
    names += [f"{stem}head.modules_to_save.default.{x}" for x in ("weight", "bias")]
    document = {"layers": names, "epochs": [[3, 4, 5, 12], [None, 1, 0, 0]]}
    (path / cells[0]["trial_id"] / "gradients.json").write_text(json.dumps(document))
    table, _ = layer_gradients(path, trials)
    norms = table.pivot(index="name", columns="epoch", values="norm")
    assert norms.loc["blocks.0.mlp.fc1", 1] == 5
    assert np.isnan(norms.loc["blocks.0.mlp.fc1", 2])
    assert norms.loc["head"].tolist() == [13, 0]


@pytest.mark.parametrize(
    "content", ['{"layers": 3}', "[]", '{"layers": ["a"], "epochs": [["x"]]}',
                '{"layers": ["a"], "epochs": [[1, 2]]}', '{"layers": ["a"], "epochs": [1]}'],
)  # fmt: skip
def test_broken_gradients_are_named(content: str, tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))
    path = synthetic.write_study(tmp_path / "s", cells)
    trials, _ = synthetic.study_frames(cells)
    (path / cells[0]["trial_id"] / "gradients.json").write_text(content)
    _, problems = layer_gradients(path, trials)
    assert len(problems) == 1


def test_what_peft_puts_around_a_layers_name_is_left_out() -> None:
    parts = ("lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector", "bias")
    assert {layer_of(f"blocks.0.mlp.fc1.{part}") for part in parts} == {"blocks.0.mlp.fc1"}
    assert layer_of("head.weight") == "head"
