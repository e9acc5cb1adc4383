"""What a search found: its trials, the Pareto set, the hypervolume, and what mattered.

Read from study.json, the trials table and search.json; Optuna's own file is never opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.folder.contents import read_json
from analysis.load import Study
from analysis.measures.pareto import costs_of, hypervolume, pareto
from analysis.statistics.cells import TIMED, finished
from tune_study.folder import schema
from tune_study.folder.files import mapping

DIRECTIONS = ("maximize", "minimize")
_NUMBERS = {column.name for column in schema.TRIALS if column.kind in ("int", "float")}


class Searched(NamedTuple):
    """A search in tables. An objective that is maximized enters a cost with its sign changed."""

    objectives: dict[str, str]
    """name -> ``maximize`` or ``minimize``; one or two."""
    num_samples: int
    trials: pd.DataFrame
    """The trials that ended well with all objectives: ``number`` (from 1, as suggested),
    ``trial_id``, the objectives, ``test_accuracy, quantization, on_front``."""
    parameters: dict[str, dict[str, Any]]
    """What was suggested, by trial id."""
    progress: pd.DataFrame
    """``number`` of the trial and ``value`` after it: the hypervolume as a fraction of the box
    between the best and the worst value of each objective; or the best value so far."""
    importances: pd.DataFrame
    """``objective, parameter, importance, trials``."""
    unavailable: dict[str, str]
    """Why an objective has no importances."""
    left_out: int = 0
    """Trials with another number of trials on their device: an objective is a time."""


def searched(study: Study) -> Searched | None:
    """The search of a study; ``None`` when the study is a grid, or its record is unusable."""
    record = mapping(study.manifest, "search")
    objectives = _objectives(record.get("objectives"))
    if not objectives:
        return None
    every = _trials(study.trials, list(objectives))
    trials = _alike(every, study.trials, objectives)
    costs = costs_of(trials, objectives)
    trials["on_front"] = pareto(costs)
    importances, unavailable = _importances(study, list(objectives))
    samples = record.get("num_samples")
    return Searched(
        objectives=objectives,
        num_samples=samples if isinstance(samples, int) else len(study.trials),
        trials=trials,
        parameters={
            str(trial_id): dict(mapping(record, "params", trial_id))
            for trial_id in mapping(record, "params")
        },
        progress=pd.DataFrame({"number": trials["number"], "value": _progress(costs, objectives)}),
        importances=importances,
        unavailable=unavailable,
        left_out=len(every) - len(trials),
    )


def _objectives(entries: Any) -> dict[str, str]:
    """Empty unless there are one or two columns of the trials table with a direction."""
    found = {}
    for entry in entries if isinstance(entries, list) else []:
        name, direction = mapping(entry).get("name"), mapping(entry).get("direction")
        if name not in _NUMBERS or direction not in DIRECTIONS:
            return {}
        found[str(name)] = str(direction)
    return found if len(found) in (1, 2) else {}


def _trials(trials: pd.DataFrame, objectives: list[str]) -> pd.DataFrame:
    numbered = trials.assign(number=np.arange(1, len(trials) + 1))
    columns = ["number", "trial_id", *objectives, "test_accuracy", "quantization"]
    good = finished(numbered)[list(dict.fromkeys(columns))].copy()
    for name in objectives:
        good[name] = good[name].astype("float64")
    usable = np.isfinite(good[objectives].to_numpy()).all(axis=1)
    return good.loc[usable].reset_index(drop=True)


def _alike(found: pd.DataFrame, trials: pd.DataFrame, objectives: Iterable[str]) -> pd.DataFrame:
    """Where an objective is a time: those of ``found`` with as many trials on a device as most.

    Those that did not record it count as one group.
    """
    if not TIMED & set(objectives) or "trials_on_device" not in trials:
        return found
    beside = found["trial_id"].map(trials.set_index("trial_id")["trials_on_device"]).fillna(0)
    return found[beside.isin(beside.mode()[-1:])].reset_index(drop=True)


def _progress(costs: np.ndarray, objectives: Mapping[str, str]) -> np.ndarray:
    """After each trial: the hypervolume as a fraction, or the best value of one objective."""
    if costs.shape[1] == 1:
        best = np.minimum.accumulate(costs[:, 0]) if len(costs) else costs[:, 0]
        return -best if "maximize" in objectives.values() else best
    if not len(costs):
        return np.zeros(0)
    low, worst = costs.min(axis=0), costs.max(axis=0)
    box = float(np.prod(worst - low))
    if box == 0:
        return np.full(len(costs), math.nan)
    return np.array([hypervolume(costs[: n + 1], worst) / box for n in range(len(costs))])


def _importances(study: Study, objectives: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    content: Any = {}
    missing = "the search has not ended yet"
    if study.path is not None:
        try:
            content = read_json(study.path / "search.json", study.path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            missing = f"search.json can't be used ({error})"
    rows, unavailable = [], {}
    for name in objectives:
        entries = mapping(content, "importances").get(name)
        usable = [
            {
                "objective": name,
                **{key: entry[key] for key in ("parameter", "importance", "trials")},
            }
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, Mapping)
            and isinstance(entry.get("parameter"), str)
            and isinstance(entry.get("importance"), int | float)
            and isinstance(entry.get("trials"), int)
        ]
        rows += usable
        if not usable:
            unavailable[name] = str(mapping(entries).get("unavailable", missing))
    return pd.DataFrame(
        rows, columns=["objective", "parameter", "importance", "trials"]
    ), unavailable
