"""Bytes of weights against theory, and what is not averaged over machines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.measures.memory import memory_ledger, memory_ratios, peak_ratios, quantized_parameters
from tests import synthetic
from tests.analysis.studies import only

TINY = ("deit_tiny_patch16_224",)


def test_memory_ratios_name_both_baselines() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY))
    row = only(memory_ratios(trials), quantization="int8")
    assert row["dataset"] == "all"
    # DESIGN.md: int8 of DeiT-tiny is 72 % smaller than fp32; 43 % than 16 bit of the whole model.
    assert 1 - row["of_fp32"] == pytest.approx(0.717, abs=0.001)
    assert row["of_16bit"] == pytest.approx(2 * row["of_fp32"])
    assert row["bits_per_parameter"] == pytest.approx(32 * row["of_fp32"])
    assert "not recorded" in row["note"]


def test_theory_with_known_layers_agrees_with_the_exact_bytes(tmp_path: Path) -> None:
    """DeiT-tiny: 12 blocks of qkv 192 -> 576, proj 192 -> 192, fc 192 -> 768 -> 192."""
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),))
    path = synthetic.write_study(tmp_path / "s", cells)
    trials, _ = synthetic.study_frames(cells)
    shapes = [[576, 192], [192, 192], [768, 192], [192, 768]] * 12
    for cell in cells:
        file = path / cell["trial_id"] / "quantization_analysis.json"
        if file.exists():
            file.write_text(json.dumps({"layers": [{"shape": shape} for shape in shapes]}))
    layers = quantized_parameters(path, trials)
    assert set(layers["quantized_parameters"]) == {5_308_416}
    table = memory_ratios(trials, layers)
    for mode in ("int8", "nf4", "nf4-dq"):
        row = only(table, quantization=mode)
        # The 4-bit figures count a 1 KiB codebook per layer, hence up to 2 % more than theory.
        assert row["measured_over_theoretical"] == pytest.approx(1, abs=0.02)
        assert row["note"] == ""
    assert only(table, quantization="none")["measured_over_theoretical"] == 1


def test_layers_held_in_the_compute_dtype_are_named(tmp_path: Path) -> None:
    """DeiT-tiny in bf16: all block layers at 16 bit in none, and half of them beside int8."""
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(42,))
    trials, _ = synthetic.study_frames(cells)
    plain = trials["quantization"] == "none"
    trials.loc[plain, "weights_bytes"] = 22_105_384 - 2 * (5_308_416 + 20_736)
    weights, constants = 5_308_416 // 2, 4 * 10_368
    trials.loc[trials["quantization"] == "int8", "weights_bytes"] = (
        22_105_384 - 3 * weights + constants - 2 * (weights + 10_368)
    )
    layers = pd.DataFrame(
        [(TINY[0], "int8", weights, 8 * weights + 8 * constants)],
        columns=["model", "quantization", "quantized_parameters", "quantized_bits"],
    )
    table = memory_ratios(trials, layers)
    row = only(table, quantization="none")
    assert row["theoretical_bits"] == 16
    assert row["of_16bit"] == pytest.approx(11_447_080 / 11_052_692)
    assert "in which it computes" in row["note"]
    assert "layers left unquantized are held at 16 bit" in only(table, quantization="int8")["note"]
    assert only(table, quantization="nf4")["note"].startswith("theory counts every weight")


def test_a_broken_quantization_file_is_no_theory(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(42,))
    path = synthetic.write_study(tmp_path / "s", cells)
    trials, _ = synthetic.study_frames(cells)
    for cell, text in zip(cells[1:], ('{"layers": [', "[]", '{"layers": 3}'), strict=True):
        (path / cell["trial_id"] / "quantization_analysis.json").write_text(text)
    assert quantized_parameters(path, trials).empty


def test_memory_is_not_averaged_over_machines() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY, datasets=("cifar10",)))
    trials["machine"] = np.where(trials["seed"] == 42, "laptop", "server")
    ledger = memory_ledger(trials)
    assert len(ledger) == 8
    assert ledger.groupby("machine")["n"].sum().to_dict() == {"laptop": 12, "server": 24}


def test_a_mixture_is_held_against_the_bits_of_each_layer(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))[:2]
    cells[1]["quantization"] = {"mode": "int8", "overrides": {"blocks.0.*": "nf4"}}
    path = synthetic.write_study(tmp_path / "s", cells[:1])
    layers = [{"shape": [64, 32], "mode": "nf4"}, {"shape": [16, 8], "mode": "int8"}]
    folder = path / cells[1]["trial_id"]
    folder.mkdir()
    (folder / "quantization_analysis.json").write_text(json.dumps({"layers": layers}))
    mixed = "int8, block 0 nf4"
    trials = synthetic.study_frames(cells[:1])[0]
    trials = trials.assign(trial_id=cells[1]["trial_id"], quantization=mixed)
    found = only(quantized_parameters(path, trials), quantization=mixed)
    assert found["quantized_parameters"] == 64 * 32 + 16 * 8
    assert found["quantized_bits"] == 64 * 32 * 4.5 + 16 * 8 * 8 + 16 * 32
    row = only(memory_ratios(trials, quantized_parameters(path, trials)), quantization=mixed)
    parameters = row["weights_bytes_fp32"] / 4
    inside = found["quantized_parameters"]
    expected = (found["quantized_bits"] + 32 * (parameters - inside)) / parameters
    assert row["theoretical_bits"] == pytest.approx(expected)
    unknown = only(memory_ratios(trials), quantization=mixed)
    assert np.isnan(unknown["theoretical_bits"])
    assert "theory needs the quantized layers" in unknown["note"]


def test_a_peak_is_set_against_its_own_pair_alone() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY, datasets=("cifar10",)))
    lost = (trials["quantization"] == "none") & (trials["lora_r"] == 16)
    trials.loc[lost, "peak_train_bytes"] = None
    ratio = only(peak_ratios(memory_ledger(trials), trials), quantization="nf4")["ratio"]
    kept = trials[trials["lora_r"] < 16].groupby("quantization")["peak_train_bytes"].sum()
    assert ratio == pytest.approx(kept["nf4"] / kept["none"])


def test_what_moves_memory_is_not_averaged_over() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY, datasets=("cifar10",)))
    trials["data.image_size"] = trials["lora_r"].map({4: 48, 8: 48, 16: 96}).astype("Int64")
    trials["training.learning_rate"] = trials["seed"].astype("float64")
    large = trials["data.image_size"] == 96
    trials.loc[large, "peak_train_bytes"] *= 4
    ledger = memory_ledger(trials)
    assert ledger.groupby("setting")["n"].sum().to_dict() == {
        "image size 48": 24,
        "image size 96": 12,
    }
    peaks = peak_ratios(ledger, trials)
    assert len(peaks) == 6
    for size, own in trials.groupby("data.image_size"):
        sums = own.groupby("quantization")["peak_train_bytes"].sum()
        row = only(peaks, quantization="int8", setting=f"image size {size}")
        assert row["ratio"] == pytest.approx(sums["int8"] / sums["none"])
