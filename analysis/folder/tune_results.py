"""A Tune ``ResultGrid`` or ``ExperimentAnalysis`` in memory -> records of trials and epochs.

Only attributes are used, so ray is not imported. Paths in the grid are not followed and nothing is
loaded: what Tune's own files hold reaches us through the objects that Tune already made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from analysis.folder.contents import StudyError
from tune_study.folder import schema
from tune_study.folder.files import mapping

_SHARED = {c.name for c in schema.TRIALS} & {c.name for c in schema.EPOCHS} - {"trial_id"}
_TRIAL_ONLY = {c.name for c in schema.TRIALS} - _SHARED - {"trial_id", "error"}
_SUMS = ("train_time_s", "train_energy_j")
"""Told by every report, for its epoch; what the last one alone tells is the trial's."""
_EPOCH_COLUMNS = [c.name for c in schema.EPOCHS if c.name != "trial_id"]


class TuneTrial(NamedTuple):
    """What Tune holds of one trial, whichever object it came from."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    """The last report."""
    history: pd.DataFrame
    """Every report, one row each."""
    error: Any


def tune_trials(grid: Any) -> Iterator[TuneTrial]:
    """The trials of a ``ResultGrid`` or an ``ExperimentAnalysis``, in its order.

    Raises ``StudyError`` for anything else.
    """
    if hasattr(grid, "trial_dataframes") and hasattr(grid, "trials"):
        for trial in grid.trials:
            history = grid.trial_dataframes.get(trial.trial_id)
            error = trial.get_error() if hasattr(trial, "get_error") else None
            yield TuneTrial(trial.config, trial.last_result or {}, _table(history), error)
    elif hasattr(grid, "__getitem__") and hasattr(grid, "__len__") and hasattr(grid, "errors"):
        # Result.config comes from the last report, so a trial that never reported has none there.
        inner = getattr(getattr(grid, "_experiment_analysis", None), "trials", None)
        for position in range(len(grid)):
            result = grid[position]
            config = result.config or (inner[position].config if inner else None) or {}
            history = _table(result.metrics_dataframe)
            yield TuneTrial(config, result.metrics or {}, history, result.error)
    else:
        raise StudyError(
            f"a {type(grid).__name__} holds no Tune results: pass what Tuner.fit() returned or an "
            "ExperimentAnalysis"
        )


def _table(history: Any) -> pd.DataFrame:
    return history if isinstance(history, pd.DataFrame) else pd.DataFrame()


def plan_entry(trial: TuneTrial) -> dict[str, Any]:
    """The trial as study.json's plan holds it. Raises ``StudyError`` for another trainable's."""
    cell, name = mapping(trial.config, "trial"), trial.config.get("trial_id")
    if not cell or not isinstance(name, str):
        raise StudyError(
            "a Tune trial's config lacks 'trial' and 'trial_id': these results are not of "
            "tune_study's trainable"
        )
    return {"trial_id": name, **cell}


def trial_record(trial: TuneTrial) -> dict[str, Any]:
    """Columns of the trials table that the reports tell, without the axes.

    The last report is read by column name. Names that both tables share (``val_accuracy``, the
    gradient columns) mean an epoch there, so those of the trial are ``val_accuracy`` at the best
    epoch, the median ``images_per_s`` and the sums of ``_SUMS``, worked out here, and stay missing
    otherwise.
    """
    metrics = trial.metrics
    row = {k: metrics[k] for k in _TRIAL_ONLY if metrics.get(k) is not None}
    row["status"] = _status(trial)
    row["error"] = metrics.get("error") or (_last_line(trial.error) if trial.error else None)
    row.setdefault("simulated", trial.config.get("simulated"))
    history = _last_of_each_epoch(trial.history)
    if row["status"] in schema.GOOD_STATUSES and "val_accuracy" in history:
        best = history.loc[history["epoch"] == row.get("best_epoch"), "val_accuracy"]
        row["val_accuracy"] = best.iloc[0] if len(best) else history["val_accuracy"].max()
    if "images_per_s" in history and len(history):
        row["images_per_s"] = history["images_per_s"].median()
    for name in _SUMS:
        if name in history and history[name].notna().sum() > 1:
            row[name] = history[name].sum(skipna=False)
    return row


def _status(trial: TuneTrial) -> str:
    """Tune marks a trial that Ctrl-C stopped as terminated: only our own word is trusted."""
    told = trial.metrics.get("status")
    if told in schema.STATUSES:
        return str(told)
    if trial.error is not None:
        return "error"
    if trial.metrics.get("test_accuracy") is not None:
        return "completed"
    return "interrupted" if "epoch" in trial.history else "pending"


def epoch_records(trial: TuneTrial, name: str) -> list[dict[str, Any]]:
    """One record per epoch, of the last report that names it."""
    history = _last_of_each_epoch(trial.history)
    kept = history[[column for column in _EPOCH_COLUMNS if column in history]]
    rows = kept.astype(object).to_dict("records")
    return [{str(k): v for k, v in row.items()} | {"trial_id": name} for row in rows]


def _last_of_each_epoch(history: pd.DataFrame) -> pd.DataFrame:
    if "epoch" not in history:
        return pd.DataFrame()
    rows = history[pd.to_numeric(history["epoch"], errors="coerce").notna()]
    return rows.drop_duplicates("epoch", keep="last")


def _last_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__)[:500]
