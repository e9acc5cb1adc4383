"""Tune's results in memory are the same study."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis import load
from analysis.load import StudyError
from tests.analysis.studies import CELLS, name, named, row, same
from tune_study.folder import schema


def fake_trials(study: load.Study, how: str) -> list[SimpleNamespace]:
    """What Tune would hold: a report per epoch, the last with the trial's columns or results."""
    trials = []
    for cell, record in zip(CELLS, study.trials.to_dict("records"), strict=True):
        own = study.epochs[study.epochs["trial_id"] == cell["trial_id"]].drop(columns="trial_id")
        config = {
            "trial": {k: v for k, v in cell.items() if k != "trial_id"},
            "trial_id": cell["trial_id"],
            "simulated": False,
        }
        reports = [
            {k: v for k, v in epoch.items() if pd.notna(v)} for epoch in own.to_dict("records")
        ]
        if reports and how == "columns":
            reports[-1] |= {
                k: v for k, v in record.items()
                if pd.notna(v) and k not in reports[-1] and k not in ("trial_id", "machine")
            }  # fmt: skip
        if reports and how == "results":
            path = study.path / cell["trial_id"] / "results.json"
            reports[-1] |= {"results": json.loads(path.read_text())}
        history = pd.json_normalize(reports, sep="/") if reports else pd.DataFrame()
        trials.append(
            SimpleNamespace(
                trial_id=f"tune_{len(trials)}",
                config=config,
                last_result={**reports[-1], "config": config} if reports else {},
                history=history.assign(trial_id="tune_0", training_iteration=1),
                get_error=lambda: None,
            )
        )
    return trials


class FakeResultGrid:
    def __init__(self, trials: list[SimpleNamespace]) -> None:
        self._experiment_analysis = SimpleNamespace(trials=trials)
        self.errors: list[Exception] = []
        self._results = [
            SimpleNamespace(
                metrics=trial.last_result,
                metrics_dataframe=trial.history,
                config=trial.last_result.get("config"),
                error=None,
                path="/somewhere/else",
            )
            for trial in trials
        ]

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, position: int) -> SimpleNamespace:
        return self._results[position]


class FakeAnalysis:
    def __init__(self, trials: list[SimpleNamespace]) -> None:
        self.trials = trials
        self.trial_dataframes = {trial.trial_id: trial.history for trial in trials}


@pytest.mark.parametrize("kind", [FakeResultGrid, FakeAnalysis])
@pytest.mark.parametrize("how", ["columns", "results"])
def test_a_grid_in_memory_is_the_same_study(folder: Path, kind: Any, how: str) -> None:
    study = load.read_study(folder)
    got = load.from_result_grid(kind(fake_trials(study, how)))
    shared = {c.name for c in schema.TRIALS} & {c.name for c in schema.EPOCHS} - {"trial_id"}
    # A report means an epoch by the names that both tables share.
    but = ("machine", *shared) if how == "columns" else ()
    same(got, study, but=but)
    assert got.problems == []
    if how == "columns":
        best = got.epochs.groupby("trial_id")["val_accuracy"].max()
        assert row(got, 0)["val_accuracy"] <= best[name(0)]
        assert row(got, 0)["images_per_s"] == row(study, 0)["images_per_s"]


def test_a_retried_epoch_in_a_grid_counts_once(folder: Path) -> None:
    study = load.read_study(folder)
    trials = fake_trials(study, "columns")
    repeated = trials[0].history.iloc[[1]].assign(val_accuracy=0.5)
    trials[0].history = pd.concat(
        [trials[0].history.iloc[:2], repeated, trials[0].history.iloc[2:]]
    )
    got = load.from_result_grid(FakeAnalysis(trials))
    own = got.epochs[got.epochs["trial_id"] == name(0)]
    assert own["epoch"].tolist() == [1, 2, 3, 4]
    assert own["val_accuracy"].iloc[1] == 0.5


def test_what_each_report_tells_of_its_epoch_is_added_up(folder: Path) -> None:
    trials = fake_trials(load.read_study(folder), "columns")
    trials[0].history = trials[0].history.assign(train_time_s=2.5, train_energy_j=[1.0, 2, 3, 4])
    trials[1].history = trials[1].history.assign(train_energy_j=[float("nan"), 2, 3, 4])
    got = load.from_result_grid(FakeAnalysis(trials))
    assert (row(got, 0)["train_time_s"], row(got, 0)["train_energy_j"]) == (10, 10)
    assert row(got, 1)["train_time_s"] == 100  # the trial's, in its last report
    assert pd.isna(row(got, 1)["train_energy_j"])


def test_tune_cannot_say_that_a_trial_is_complete(folder: Path) -> None:
    trials = fake_trials(load.read_study(folder), "none")
    trials[1].get_error = lambda: ValueError("Traceback\n  line\nRuntimeError: out of luck")
    got = load.from_result_grid(FakeAnalysis(trials))
    assert row(got, 0)["status"] == "interrupted"
    assert row(got, 1)["status"] == "error"
    assert row(got, 1)["error"] == "RuntimeError: out of luck"
    assert row(got, 5)["status"] == "pending"
    assert named(got, "reported no status")


def test_other_objects_and_other_trainables_are_refused() -> None:
    with pytest.raises(StudyError, match="list holds no Tune results"):
        load.from_result_grid([])
    foreign = SimpleNamespace(trial_id="t", config={"lr": 1}, last_result={})
    with pytest.raises(StudyError, match="not of tune_study"):
        load.from_result_grid(
            SimpleNamespace(trials=[foreign], trial_dataframes={"t": pd.DataFrame()})
        )
