"""Two studies of the same cells, paired by configuration, mode and seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from analysis import compare
from analysis.folder.configurations import SHORT
from analysis.load import Study, StudyError, read_study
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)
CELLS = synthetic.plan(models=TINY)


def _study(cells: Any = CELLS, **model: Any) -> Study:
    trials, epochs = synthetic.study_frames(cells, **model)
    trials["machine"] = "laptop"
    return Study(trials, epochs, {"study": "s", "plan": list(cells), "simulated": False}, [], None)


def _row(found: compare.Comparison, metric: str, mode: str) -> Any:
    table = found.table
    return table[(table["metric"] == metric) & (table["quantization"] == mode)].iloc[0]


def test_a_planted_change_is_found_with_the_interval_of_scipy() -> None:
    a, b = _study(rng_seed=1), _study(rng_seed=1)
    nf4 = b.trials["quantization"] == "nf4"
    b.trials.loc[nf4, "test_accuracy"] -= 0.02 + 0.001 * b.trials.loc[nf4, "lora_r"].astype(float)
    found = compare.compare(a, b)
    row = _row(found, "test_accuracy", "nf4")
    difference = (b.trials["test_accuracy"] - a.trials["test_accuracy"])[nf4]
    means = difference.groupby([b.trials.loc[nf4, k] for k in list(SHORT)]).mean()
    low, high = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
    assert row["n_pairs"] == 18
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high))
    assert row["verdict"] == "worse"
    untouched = _row(found, "test_accuracy", "int8")
    assert (untouched["verdict"], untouched["identical"]) == ("identical", 18)
    everything = _row(found, "test_accuracy", "all")
    assert everything["n_pairs"] == 72
    assert everything["mean_difference"] == pytest.approx(means.mean() / 4)


def test_cells_of_one_study_only_are_named() -> None:
    found = compare.compare(_study(CELLS[:40]), _study(CELLS[4:44]))
    assert found.n_pairs == 36
    assert sorted(found.only_a) == sorted(cell["trial_id"] for cell in CELLS[:4])
    assert sorted(found.only_b) == sorted(cell["trial_id"] for cell in CELLS[40:44])


def test_another_status_is_named_and_not_paired() -> None:
    found = compare.compare(_study(), _study(failures={0: "oom"}))
    assert found.changed_status == [f"{CELLS[0]['trial_id']}: completed in A, oom in B"]
    assert _row(found, "test_accuracy", "none")["n_pairs"] == 17


def test_other_settings_and_hardware_are_named() -> None:
    cells = json.loads(json.dumps(CELLS))
    for cell in cells:
        cell["training"]["learning_rate"] = 3e-4
        cell["trial_id"] += "x"
    a, b = _study(), _study(cells)
    b.trials["machine"] = "server"
    found = compare.compare(a, b)
    assert ("setting: training.learning_rate", "0.0001", "0.0003") in found.differences
    assert not any("trial_id" in name for name, *_ in found.differences)
    assert any("laptop and server" in note for note in found.notes)


def test_trials_that_shared_a_device_are_compared_and_it_is_said() -> None:
    a, b = _study(), _study()
    a.trials.loc[:, "trials_on_device"] = 1
    assert not compare.compare(a, a).notes
    for counts, told in ((8, "8"), (pd.NA, "not recorded")):
        b.trials.loc[:, "trials_on_device"] = counts
        found = compare.compare(a, b)
        assert found.notes == [
            f"Trials on a device at a time: 1 in A, {told} in B; time compares that as much as the "
            "versions."
        ]
        assert _row(found, "train_time_s", "none")["n_pairs"] == 18


def test_studies_that_share_nothing_or_mix_kinds_are_refused() -> None:
    other = synthetic.plan(models=("another",))
    with pytest.raises(StudyError, match="share no cell"):
        compare.compare(_study(), _study(other))
    simulated = _study()._replace(manifest={"simulated": True, "plan": CELLS})
    with pytest.raises(StudyError, match="like with like"):
        compare.compare(_study(), simulated)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = synthetic.write_study(tmp_path / "a", CELLS, rng_seed=1)
    b = synthetic.write_study(tmp_path / "b", CELLS, rng_seed=2)
    manifest = json.loads((b / "study.json").read_text())
    manifest["provenance"]["versions"]["torch"] = "2.10"
    (b / "study.json").write_text(json.dumps(manifest))
    assert compare.main([str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "versions: torch: 2.9 -> 2.10" in text
    assert "72 cells in both." in text
    assert "weights" in text
    assert "identical" in text
    assert read_study(a).problems == []
    assert compare.main([str(a), str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere" in error


def test_what_varies_in_a_study_is_matched_and_what_differs_between_them_compared() -> None:
    """Two learning rates in each are two cells; a weight decay of each is what is compared."""

    def planned(decay: float) -> Study:
        cells = [
            {**cell, "training": {"learning_rate": rate, "weight_decay": decay}}
            for cell in CELLS[:8]
            for rate in (0.1, 0.2)
        ]
        cells = [{**cell, "trial_id": str(number)} for number, cell in enumerate(cells)]
        return _study(cells)

    a, b = planned(0.0), planned(0.5)
    b.trials.loc[b.trials["training.learning_rate"] == 0.2, "test_accuracy"] -= 0.01
    found = compare.compare(a, b)
    assert found.n_pairs == 16
    assert ("setting: training.weight_decay", "0.0", "0.5") in found.differences
    assert not any("learning_rate" in name for name, *_ in found.differences)
    row = _row(found, "test_accuracy", "all")
    difference = b.trials["test_accuracy"].to_numpy() - a.trials["test_accuracy"].to_numpy()
    assert row["n_configurations"] == 2
    assert row["mean_difference"] == pytest.approx(difference.mean())
