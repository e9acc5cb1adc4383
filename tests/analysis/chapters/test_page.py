"""What the page says of a study that is unfinished, not begun, or lacks a measure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from analysis.chapters import trials
from analysis.findings import summary
from tests import synthetic
from tests.analysis.pages import written

TINY = ("deit_tiny_patch16_224",)


@pytest.mark.usefixtures("plain_figures")
def test_an_unfinished_study_says_so_on_top(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    waiting = {1: "pending", 2: "pending", 3: "interrupted", 4: "oom"}
    path = synthetic.write_study(tmp_path / "s", cells, failures=waiting)
    text = written(path)[1].text
    top = text[: text.index("What to use")]
    assert "(unfinished)" in top
    assert "33 of 36 trials have ended, 3 are still to run" in top
    assert "1 trial of 36 failed (1 oom)" in top


@pytest.mark.usefixtures("plain_figures")
def test_nothing_has_run_yet(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    path = synthetic.write_study(
        tmp_path / "s", cells, failures=dict.fromkeys(range(len(cells)), "pending")
    )
    document = written(path)[1]
    assert "0 of 36 trials have ended" in document.text
    assert document.named("img") == []
    found = json.loads((path / summary.SUMMARY_FILE).read_text())
    assert found["progress"]["success_rate"] is None
    for name in ("accuracy", "convergence", "gradient_flow", "statistical_significance"):
        assert found[name]["unavailable"]
    assert found["memory"]["base_weights"]["unavailable"]


@pytest.mark.usefixtures("plain_figures")
def test_missing_columns_are_explained(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    missing = ("peak_train_bytes", "activation_bytes", "gradient_cosine", "gradient_norm_ratio",
               "images_per_s", "grad_norm_mean", "peak_source", "train_energy_j")  # fmt: skip
    path = synthetic.write_study(tmp_path / "s", cells, missing=missing, gradients=False)
    text = written(path)[1].text
    assert "no trial measured the peak of a training step on this machine" in text
    assert "Gradient fidelity was not measured" in text
    assert "no gradients.json holds per-layer norms" in text
    assert "No finished pair of trials recorded its throughput" in text
    assert "The energy of training can't be compared: a counter." in text  # its reason, as planted
    assert "Accuracy against the energy" not in text
    assert "nan" not in re.findall(r"[a-z]+", text.lower())


def test_what_was_read_and_left_out_of_a_folder_of_images_is_repeated() -> None:
    entry = {
        "sha256": "ab" * 32,
        "images": "20 images",
        "left_out": [f"{n}.png" for n in range(60)],
    }
    rows = dict(trials.provenance({"provenance": {"data": {"folder:d": entry, "digits": 3}}}))
    assert rows["images: folder:d"] == "20 images"
    assert rows["left out: folder:d"].startswith("0.png, 1.png, ")
    assert rows["left out: folder:d"].endswith(", 49.png and 10 more")
    whole = {"provenance": {"data": {"folder:d": {**entry, "left_out": []}}}}
    assert "left out: folder:d" not in dict(trials.provenance(whole))
