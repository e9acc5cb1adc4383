"""Bytes of weights against theory, and what is not averaged over machines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.measures.memory import memory_ledger, memory_ratios, quantized_parameters
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
