"""A study folder -> the trials table and the epochs table, and what is wrong with the folder.

Nothing here unpickles, and no path that a file names is followed: a folder from a stranger is read
as text and numbers. Everything that could not be used is named in ``Study.problems``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.folder import configurations, tables, tune_results
from analysis.folder.contents import (
    Contents,
    StudyError,
    listed,
    machine,
    open_study,
    read_failure,
    read_results,
    survey,
)
from analysis.text.layout import clean
from tune_study.folder import names, schema
from tune_study.folder.files import mapping
from tune_study.folder.results import AXES, PLANNED, axes, measured

_COLUMNS = (*schema.TRIALS, tables.MACHINE)


class Study(NamedTuple):
    """A study in memory.

    ``trials`` has one row per planned trial: the columns of ``schema.TRIALS`` and ``machine``, the
    hardware in words. ``configuration`` names what the trials of one unit of inference share.
    ``epochs`` has one row per trial and finished epoch (``schema.EPOCHS``). ``manifest`` is
    study.json. ``problems`` are sentences; empty means that nothing was lost.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    manifest: dict[str, Any]
    problems: list[str]
    path: Path | None = None


def read_study(path: str | Path) -> Study:
    """The study under ``path``, from its tables or rebuilt from the trials' JSON.

    The parquet tables are used when both are whole, have the schema's columns, agree with the
    plan in study.json and are not older than any trial's results.json; otherwise ``problems``
    says why not. Without them and without JSON, the CSV tables are used. Raises ``StudyError``
    when ``path`` is no study or mixes simulated and real trials.
    """
    folder, manifest, problems = open_study(path)
    found = survey(folder, manifest["plan"])
    kinds = ("parquet", "csv") if not found.results else ("parquet",)
    for kind in kinds:
        try:
            trials, epochs, lost = _read_tables(folder, manifest, found, kind)
        except tables.TableError as error:
            if (folder / f"trials.{kind}").exists() or kind == "parquet":
                instead = ", but the trials' own files" if found.results else ""
                problems.append(f"the .{kind} tables are not used{instead}: {error}")
            continue
        if kind == "csv":
            problems.append("the tables were read from the .csv files")
        problems += found.problems + lost
        return _checked(Study(trials, epochs, manifest, problems, folder))
    return _rebuild(folder, manifest, found, problems)


def rebuild(path: str | Path) -> Study:
    """The study under ``path`` from study.json and the trials' JSON alone, in the plan's order.

    A planned trial without a usable results.json stays a row: ``pending`` when it has none,
    ``interrupted`` when it can't be read. Raises ``StudyError`` like :func:`read_study`.
    """
    folder, manifest, problems = open_study(path)
    return _rebuild(folder, manifest, survey(folder, manifest["plan"]), problems)


def write_tables(study: Study, path: str | Path) -> None:
    """trials and epochs as .csv and .parquet under ``path``, each file whole or not at all."""
    tables.write_frame(study.epochs, Path(path), "epochs")
    tables.write_frame(study.trials, Path(path), "trials")


def from_result_grid(grid: Any) -> Study:
    """What ``Tuner.fit()`` returned, or an ``ExperimentAnalysis``, as the same tables.

    Each trial's config holds ``trial_id`` and, under ``trial``, the configuration nested as in
    study.json's plan. Each report holds an epoch's columns; the last one may hold any column of
    the trials table, and ``results``, the contents of results.json, which then counts alone.
    Raises ``StudyError`` when ``grid`` is something else. Ray is not imported.
    """
    rows, curves, plan = [], [], []
    problems: list[str] = []
    told = 0
    for trial in tune_results.tune_trials(grid):
        entry = tune_results.plan_entry(trial)
        results = mapping(trial.metrics, "results")
        if results:
            row = measured(results)
            row["machine"] = machine(mapping(results, "meta", "hardware"))
            told += 1
            curves += tables.curve(entry["trial_id"], results, problems)
        else:
            row = tune_results.trial_record(trial)
            told += "status" in trial.metrics or row["status"] != "interrupted"
            curves += tune_results.epoch_records(trial, entry["trial_id"])
        rows.append(axes(entry) | row)
        plan.append(entry)
    if silent := len(rows) - told:
        problems.append(
            f"{silent} trial(s) reported no status of ours and count as interrupted: what they "
            "measured after their last epoch is in the study folder alone"
        )
    manifest: dict[str, Any] = {"study": "in memory", "simulated": None, "plan": plan}
    return _study(rows, curves, manifest, problems, None)


def told(action: Callable[[], str], failed: str) -> int:
    """Prints what a command finds, and returns 0; or 2 after one sentence on a mistake.

    ``failed`` begins that of a file that can't be read or written.
    """
    try:
        found = action()
    except StudyError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    except OSError as error:
        print(clean(f"{failed}: {error}"), file=sys.stderr)
        return 2
    print(found)
    return 0


# ---- from the tables


def _read_tables(
    folder: Path, manifest: Mapping[str, Any], found: Contents, kind: str
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Both tables. Raises ``TableError`` with the reason why they can't stand for the study."""
    read = tables.read_parquet if kind == "parquet" else tables.read_csv
    frames, problems = [], []
    for name, columns in (("trials", _COLUMNS), ("epochs", schema.EPOCHS)):
        path = folder / f"{name}.{kind}"
        if not path.exists():
            raise tables.TableError(f"{path.name} does not exist")
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise tables.TableError(f"{path.name} is no regular file of this folder")
        if found.results and path.stat().st_mtime_ns < max(found.results.values()):
            raise tables.TableError(
                f"{path.name} is older than a trial's results.json, or was copied without its time"
            )
        try:
            frame, lost = read(path, columns, name, alone=not found.results)
        except tables.TableError as error:
            raise tables.TableError(f"{path.name} {error}") from None
        frames.append(frame)
        problems += lost
    trials, epochs = frames
    if manifest["plan"]:
        trials = _on_plan(trials, manifest["plan"])
    ended = (set(found.results) | found.failures) & set(_pending(trials))
    if ended:
        raise tables.TableError(f"they say that {listed(sorted(ended))} never began")
    torn = _torn(trials, epochs)
    if torn and found.results:
        raise tables.TableError(f"trials and epochs disagree on {torn} trial(s)")
    if torn:
        problems.append(f"the trials and epochs tables disagree on {torn} trial(s)")
    return trials, epochs, problems


def _pending(trials: pd.DataFrame) -> pd.Series:
    return trials.loc[trials["status"].fillna("pending") == "pending", "trial_id"]


def _on_plan(trials: pd.DataFrame, plan: list[dict[str, Any]]) -> pd.DataFrame:
    """The table with all that the plan tells of each trial, which an earlier version left out.

    Raises ``TableError`` unless the rows are the planned trials, each once, on their axes.
    """
    planned = _typed_plan(plan)
    if len(planned) != len(trials):
        raise tables.TableError(f"they hold {len(trials)} trials, but {len(planned)} are planned")
    if trials["trial_id"].duplicated().any():
        raise tables.TableError("a trial has two rows")
    place = pd.Index(planned["trial_id"]).get_indexer(pd.Index(trials["trial_id"]))
    if (place < 0).any():
        raise tables.TableError("their trial_id differs from the plan in study.json")
    told = planned.iloc[place].set_axis(trials.index)
    # Once the mode alone stood where the treatment's name stands now.
    earlier = bool(trials["quantization.mode"].isna().all())
    for name in PLANNED:
        by_mode = earlier and name == "quantization"
        held, wanted = trials[name], told["quantization.mode" if by_mode else name]
        # Two missing values count as equal here, unlike with ==.
        if not held.equals(wanted) and (name in AXES or held.notna().any()):
            raise tables.TableError(f"their {name} differs from the plan in study.json")
    return trials.assign(**{name: told[name] for name in PLANNED})


def _typed_plan(plan: list[dict[str, Any]]) -> pd.DataFrame:
    columns = tuple(column for column in schema.TRIALS if column.name in PLANNED)
    entries = tables.frame([axes(entry) for entry in plan], columns)
    return tables.typed(entries, columns, "plan")[0]


def _torn(trials: pd.DataFrame, epochs: pd.DataFrame) -> int:
    """Trials whose epochs are not as many as their row says: one table is newer than the other."""
    place = pd.Index(trials["trial_id"]).get_indexer(pd.Index(epochs["trial_id"]))
    counted = np.bincount(place[place >= 0], minlength=len(trials))
    told = trials["epochs_completed"].fillna(0).to_numpy("int64")
    return int((counted != told).sum()) + int((place < 0).any())


# ---- from the trials' JSON


def _rebuild(folder: Path, manifest: dict[str, Any], found: Contents, problems: list[str]) -> Study:
    rows, curves = [], []
    for entry in manifest["plan"]:
        name = entry["trial_id"]
        results, problem = read_results(folder, name, manifest["simulated"], found)
        row = axes(entry) | {"status": "pending", "simulated": manifest["simulated"]}
        if results is not None:
            row |= measured(results)
            row["machine"] = machine(mapping(results, "meta", "hardware"))
            curves += tables.curve(name, results, problems)
        elif problem:
            row |= {"status": "interrupted", "error": problem}
            problems.append(f"trial {name!r}: {problem}")
        elif name in found.failures:
            row |= {"status": "error", "error": read_failure(folder, name)}
            problems.append(f"trial {name!r}: it has an error.json and no results.json")
        rows.append(row)
    return _study(rows, curves, manifest, problems + found.problems, folder)


def _study(
    rows: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    manifest: dict[str, Any],
    problems: list[str],
    folder: Path | None,
) -> Study:
    """Both tables from one record per trial and one per epoch."""
    trials, lost = tables.typed(tables.frame(rows, _COLUMNS), _COLUMNS, "trials")
    epochs, lost_epochs = tables.typed(tables.frame(curves, schema.EPOCHS), schema.EPOCHS, "epochs")
    problems = [*problems, *lost, *lost_epochs]
    if not epochs.empty:
        most = epochs.groupby("trial_id")["epoch"].nunique()
        counted = trials["trial_id"].map(most).astype("Int64")
        trials["epochs_completed"] = trials["epochs_completed"].fillna(counted)
    return _checked(Study(trials, epochs, manifest, problems, folder))


# ---- both ways


def _checked(study: Study) -> Study:
    """Rows in order, one per epoch; what is implausible is named. Raises ``StudyError``."""
    trials, manifest, problems = study.trials, study.manifest, list(study.problems)
    flags = set(trials["simulated"].dropna().unique()) | {manifest["simulated"]} - {None}
    if len(flags) > 1:
        raise StudyError(
            f"study {study.path or manifest['study']} mixes simulated and real trials: "
            "a study is one or the other, so run them as two"
        )
    manifest["simulated"] = bool(flags.pop()) if flags else False
    trials["simulated"] = trials["simulated"].fillna(manifest["simulated"])
    strange = trials["status"].notna() & ~trials["status"].isin(schema.STATUSES)
    if strange.any():
        words = sorted(set(trials.loc[strange, "status"]))
        problems.append(f"{int(strange.sum())} trial(s) have status {listed(words)}: now error")
        trials.loc[strange, "status"] = "error"
    trials["status"] = trials["status"].fillna("pending")
    where = machine(mapping(manifest, "provenance", "hardware"))
    ran_somewhere = trials["machine"].isna() & (trials["status"] != "pending")
    if where is not None and ran_somewhere.any():
        trials.loc[ran_somewhere, "machine"] = where
    modes = trials["quantization.mode"].fillna(trials["quantization"])
    unknown = sorted(set(modes.dropna().unique()) - set(schema.MODES))
    if unknown:
        problems.append(f"unknown quantization in the plan: {listed(unknown)}")
    if others := _not_known(manifest["plan"]):
        problems.append(
            f"the trials differ in settings that this version does not know ({listed(others)}) and "
            "cannot tell apart: open the study with the version that wrote it"
        )
    silent = trials["status"].isin(schema.GOOD_STATUSES) & trials["test_accuracy"].isna()
    if silent.any():
        ids = list(trials.loc[silent, "trial_id"])
        problems.append(f"ended well, but without a test accuracy: {listed(ids)}")
    epochs, dropped = _in_order(study.epochs, trials)
    named = configurations.named(trials.assign(configuration=None))
    return Study(named, epochs, manifest, problems + dropped, study.path)


def _not_known(plan: list[dict[str, Any]]) -> list[str]:
    """Settings of a later version in which the planned trials differ."""
    cells = [names.settings(entry) for entry in plan]
    others = {name for cell in cells for name in cell} - set(schema.SETTING_NAMES)
    return [name for name in names.varying_fields(cells) if name in others] if others else []


def _in_order(epochs: pd.DataFrame, trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Sorted by plan and epoch, the last row of an epoch: a resumed trial writes some twice."""
    place = pd.Index(trials["trial_id"]).get_indexer(pd.Index(epochs["trial_id"]))
    number = epochs["epoch"].fillna(0).to_numpy("int64")
    known = (place >= 0) & (number >= 1)
    problems = []
    if not known.all():
        lost = int((~known).sum())
        problems.append(f"{lost} epoch row(s) without a planned trial or an epoch from 1: dropped")
        epochs, place, number = epochs[known], place[known], number[known]
    later = np.diff(place) > 0
    if (later | ((np.diff(place) == 0) & (np.diff(number) > 0))).all():
        return epochs.reset_index(drop=True), problems
    order = np.lexsort((np.arange(len(place)), number, place))
    place, number = place[order], number[order]
    last = np.append((np.diff(place) != 0) | (np.diff(number) != 0), True)
    return epochs.iloc[order[last]].reset_index(drop=True), problems
