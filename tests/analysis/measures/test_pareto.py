"""Pareto sets against all pairs."""

from __future__ import annotations

import pandas as pd

from analysis.measures.pareto import pareto_front
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)


def test_pareto_front_against_all_pairs(frames: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = pareto_front(frames[0])
    assert len(table) == 48
    for _, group in table.groupby("dataset"):
        cells = group[["cost", "score", "on_front"]].to_numpy("float64")
        for cost, score, on_front in cells:
            beaten = any(
                (c <= cost and s >= score) and (c < cost or s > score) for c, s, _ in cells
            )
            assert bool(on_front) == (not beaten)


def test_equal_cells_stand_on_the_pareto_front_together() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY, datasets=("cifar10",)))
    trials["test_accuracy"] = 0.5
    front = pareto_front(trials).query("on_front")
    assert list(front["quantization"]) == ["nf4-dq"] * trials["lora_r"].nunique()


def test_times_are_ranked_among_trials_with_as_many_beside_them() -> None:
    """Two configurations of one mode: the slower one had others beside it, and is no worse."""
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY, datasets=("cifar10",)))
    trials = trials[(trials["quantization"] == "none") & trials["lora_r"].isin([4, 8])].copy()
    trials["test_accuracy"] = 0.5
    many = trials["lora_r"] == 8
    trials.loc[many, "train_time_s"] *= 5
    assert pareto_front(trials, cost="train_time_s")["on_front"].tolist() == [True, False]
    trials.loc[:, "trials_on_device"] = 1
    trials.loc[many, "trials_on_device"] = 8
    table = pareto_front(trials, cost="train_time_s")
    assert table["on_front"].tolist() == [True, True]
    assert table["trials_on_device"].tolist() == [1, 8]
    assert "trials_on_device" not in pareto_front(trials, cost="peak_train_bytes")
    trials.loc[many, "trials_on_device"] = pd.NA  # not recorded
    assert pareto_front(trials, cost="train_time_s")["on_front"].tolist() == [True, True]
