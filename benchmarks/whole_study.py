"""What a study costs beyond the training and evaluation of its trials."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from ray import tune

from benchmarks.timing import Comparison

SEEDS = 36
EPOCHS = 4


def short_trials() -> dict[str, Any]:
    """144 short trials on the shipped backbone and digits: 4 modes x 36 seeds."""
    return {
        "model": "vit_glyphs_patch4_32",
        "dataset": "digits",
        "lora": {"r": 4, "lora_alpha": 8},
        "quantization": tune.grid_search(["none", "int8", "nf4", "nf4-dq"]),
        "seed": tune.grid_search(list(range(SEEDS))),
        "data": {"val_size": 64, "test_size": 64},
        "training": {"num_train_epochs": EPOCHS, "early_stopping_patience": 0},
    }


def study_overhead(trials: int, images: int, device: str) -> list[Comparison]:
    """Three figures of one study of ``trials`` short trials on ``images`` images each, as the
    command runs it."""
    with tempfile.TemporaryDirectory() as folder:
        grid = f"{__file__}:short_trials"
        command = [sys.executable, "-m", "tune_study.run", "--grid", grid, "--device", device]
        command += ["--output-dir", folder, "--max-experiments", str(trials)]
        command += ["--train-size", str(images)]
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        said = [(time.perf_counter() - begun, line) for line in process.stdout]
        code, wall = process.wait(), time.perf_counter() - begun
        if code:
            raise RuntimeError("".join(line for _, line in said))
        study = Path(folder) / "short_trials"
        table = pd.read_parquet(study / "trials.parquet")
        results = [json.loads(path.read_text()) for path in study.glob("*/results.json")]
        epochs = pd.read_parquet(study / "epochs.parquet")
    busy = table["train_time_s"] + table["eval_time_s"]
    first_epoch = next(moment for moment, line in said if re.search(r": epoch 1/", line))
    ends = [moment for moment, line in said if re.search(r": (completed|early_stopped)", line)]
    first_step = first_epoch - float(epochs["epoch_time_s"].iloc[0])
    further = (ends[-1] - ends[0] - busy.iloc[1:].sum()) / max(1, len(ends) - 1)
    measuring = median(result["train"]["measuring_time_s"] for result in results)
    shortest = f"{trials} trials of {busy.min():.1f} to {busy.max():.1f} s"
    return [
        Comparison(
            "study overhead: (wall - training and evaluation) / (training and evaluation)",
            "<= 0.03",
            [(wall - busy.sum()) / busy.sum()],
            {"wall": wall, "training and evaluation": busy.sum()},
            "s",
            shortest,
        ),
        Comparison(
            "from the command to the first step, in seconds", "<= 15.0", [first_step], {}, "s"
        ),
        Comparison(
            "per further trial, outside training and evaluation, in seconds",
            "<= 0.5",
            [further],
            {},
            "s",
            f"{shortest}; a trial measures its memory and fidelity for {measuring:.1f} s (median)",
        ),
    ]
