"""The chapter on accuracy."""

from __future__ import annotations

import math

import pandas as pd

from analysis.chapters import accuracy


def test_the_choice_of_the_epoch_is_told_with_its_standard_error() -> None:
    trials = pd.DataFrame(
        {
            "dataset": ["cifar10"] * 4,
            "quantization": ["none", "none", "int8", "int8"],
            "val_accuracy": [0.8, 0.8, 0.8, 0.8],
            "val_images": [100] * 4,
            "best_epoch": [4, 4, 2, 4],
            "epochs_completed": [4] * 4,
        }
    )
    (said,) = accuracy._choice_of_epoch(trials)
    assert "cifar10: 100 validation images, standard error 4.00 pp" in said  # sqrt(0.8 * 0.2 / 100)
    assert said.endswith("before their last: none 0 of 2, int8 1 of 2.")
    assert accuracy._choice_of_epoch(trials.assign(val_images=math.nan)) == []
