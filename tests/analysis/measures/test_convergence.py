"""Convergence measures against hand-drawn curves and a slow loop over trials."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.folder.configurations import SHORT
from analysis.measures import convergence
from tests import synthetic

COLUMNS = ["val_accuracy", "train_loss", "train_accuracy", "val_loss"]


def tables(curves: dict[str, dict[str, Any]], status: str = "completed") -> Any:
    """epochs and trials of the given columns per trial."""
    epochs = pd.concat(
        [
            pd.DataFrame(curve).assign(
                trial_id=name, epoch=range(1, len(next(iter(curve.values()))) + 1)
            )
            for name, curve in curves.items()
        ]
    )
    trials = pd.DataFrame({"trial_id": list(curves), "status": status})
    trials = trials.assign(
        model="m", dataset="d", lora_r=1, lora_alpha=2, quantization="nf4", seed=1
    )
    return epochs, trials


def measured(**curve: Any) -> pd.Series:
    return convergence.convergence_table(*tables({"t": curve})).iloc[0]


def test_a_hand_drawn_curve() -> None:
    row = measured(
        val_accuracy=[0.50, 0.75, 0.76, 0.797, 0.80, 0.79],
        train_accuracy=[0.4, 0.7, 0.8, 0.85, 0.88, 0.95],
        train_loss=[2.0, 1.0, 1.2, 0.8, 0.7, 0.6],
        val_loss=[2.1, 1.2, 1.1, 1.0, 1.0, 1.3],
    )
    assert row["epochs_seen"] == 6
    assert row["epochs_to_95"] == 3  # 0.95 x 0.80 = 0.76
    assert row["plateau_epoch"] == 4  # 0.797 is within 0.005 of 0.80
    assert row["overfit_gap"] == pytest.approx(0.88 - 0.80)
    assert row["loss_gap"] == pytest.approx(1.0 - 0.7)
    assert row["train_loss_rises"] == pytest.approx(1 / 5)
    # steps -1, .2, -.4, -.1, -.1: second differences 1.2, .6, .3, 0 over a range of 1.4
    assert row["train_loss_roughness"] == pytest.approx((1.2 + 0.6 + 0.3 + 0) / 4 / 1.4)
    assert row["note"] == ""


def test_a_straight_line_is_smooth_and_its_plateau_is_unknown() -> None:
    row = measured(val_accuracy=[0.1, 0.2, 0.3, 0.4], train_loss=[4.0, 3.0, 2.0, 1.0])
    assert row["train_loss_roughness"] == pytest.approx(0)
    assert np.isnan(row["plateau_epoch"])
    assert "last epoch" in row["note"]
    assert np.isnan(row["overfit_gap"])


def test_the_first_of_equal_best_epochs_counts() -> None:
    row = measured(val_accuracy=[0.5, 0.8, 0.8], train_accuracy=[0.5, 0.9, 0.99])
    assert row["overfit_gap"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("curve", "word"),
    [
        ({"val_accuracy": [0.5], "train_loss": [1.0]}, "fewer than three"),
        (
            {"val_accuracy": [np.nan] * 4, "train_loss": [1.0, np.nan, 2.0, 1.0]},
            "without validation",
        ),
    ],
)
def test_what_cannot_be_measured_is_missing_and_said(curve: Any, word: str) -> None:
    row = measured(**curve)
    assert np.isnan(row["plateau_epoch"])
    assert np.isnan(row["train_loss_roughness"])
    assert word in row["note"]


def test_curves_do_not_leak_into_their_neighbours() -> None:
    curves = {
        "a": {"val_accuracy": [0.9, 0.91], "train_loss": [9.0, 8.0]},
        "b": {"val_accuracy": [0.1, 0.2, 0.21, 0.2], "train_loss": [1.0, 0.5, 0.4, 0.3]},
        "c": {"val_accuracy": [0.5, 0.4, 0.3], "train_loss": [0.1, 0.2, 0.3]},
    }
    epochs, trials = tables(curves)
    together = convergence.convergence_table(epochs.sample(frac=1, random_state=0), trials)
    for position, name in enumerate(curves):
        alone = convergence.convergence_table(*tables({name: curves[name]}))
        pd.testing.assert_series_equal(
            together.iloc[position], alone.iloc[0], check_names=False, check_dtype=False
        )


def slow(epochs: pd.DataFrame) -> dict[str, float]:
    """The same measures of one trial, by plain Python."""
    rows = epochs.sort_values("epoch").to_dict("records")
    best = max(row["val_accuracy"] for row in rows)
    at_best = next(row for row in rows if row["val_accuracy"] == best)
    first = next(row["epoch"] for row in rows if row["val_accuracy"] >= 0.95 * best)
    plateau = next(row["epoch"] for row in rows if row["val_accuracy"] >= best - 0.005)
    loss = [row["train_loss"] for row in rows]
    bends = [abs(loss[i + 1] - 2 * loss[i] + loss[i - 1]) for i in range(1, len(loss) - 1)]
    return {
        "epochs_to_95": first,
        "plateau_epoch": plateau if plateau < len(rows) else float("nan"),
        "train_loss_roughness": sum(bends) / len(bends) / (max(loss) - min(loss)),
        "train_loss_rises": sum(b > a for a, b in itertools.pairwise(loss)) / (len(loss) - 1),
        "overfit_gap": at_best["train_accuracy"] - best,
        "loss_gap": at_best["val_loss"] - at_best["train_loss"],
    }


def test_a_whole_study_agrees_with_the_slow_version() -> None:
    trials, epochs = synthetic.study_frames(failures={0: "pending", 1: "diverged"})
    epochs["train_loss"] += np.random.default_rng(0).normal(0, 0.05, len(epochs))
    got = convergence.convergence_table(epochs, trials).set_index("trial_id")
    assert len(got) == len(trials)
    for trial_id, own in epochs.groupby("trial_id"):
        for name, value in slow(own).items():
            assert got.loc[trial_id, name] == pytest.approx(value, nan_ok=True), name
    pending = got.iloc[0]
    assert pending["epochs_seen"] == 0
    assert pending[list(convergence.METRICS)].isna().all()
    assert pending["note"] == "no epoch was trained"
    assert np.isnan(got.iloc[1]["stopped_early"])


def test_early_stopping_per_mode() -> None:
    cells = synthetic.plan(datasets=("cifar10",), lora=((4, 8),))
    stopped = {
        i: "early_stopped" for i, c in enumerate(cells) if c["quantization"]["mode"] == "nf4"
    }
    del stopped[min(stopped)]
    trials, epochs = synthetic.study_frames(cells, failures={**stopped, 0: "oom"})
    got = convergence.early_stopping(convergence.convergence_table(epochs, trials))
    by_mode = got.set_index("quantization")
    assert by_mode["n_trials"].tolist() == [5, 6, 6, 6]
    assert by_mode["n_stopped"].tolist() == [0, 0, 5, 0]
    assert by_mode.loc["nf4", "share_stopped"] == pytest.approx(5 / 6)
    assert by_mode.loc["none", "epochs_median"] == 15


def test_a_slower_mode_is_found_by_the_same_inference() -> None:
    trials, epochs = synthetic.study_frames()
    late = trials.loc[trials["quantization"] == "nf4", "trial_id"]
    slower = epochs["trial_id"].isin(late)
    # Half the speed: the epoch e of nf4 shows what epoch e / 2 showed.
    rows = epochs[slower]
    epochs.loc[slower, "val_accuracy"] = 0.9 * (1 - np.exp(-rows["epoch"].astype(float) / 6))
    table = convergence.convergence_table(epochs, trials)
    got = convergence.compare_convergence(table).set_index(["metric", "quantization"])
    assert len(got) == len(convergence.METRICS) * 3
    row = got.loc[("epochs_to_95", "nf4")]
    assert row["verdict"] == "worse"
    assert row["mean_difference"] > 2
    assert row["n_configurations"] == 12
    assert got.loc[("epochs_to_95", "int8"), "verdict"] in ("undecided", "cannot be inferred")
    by_hand = table.groupby([*SHORT, "quantization"])["epochs_to_95"].mean().unstack()
    assert row["mean_difference"] == pytest.approx((by_hand["nf4"] - by_hand["none"]).mean())
