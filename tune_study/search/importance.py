"""How much each parameter of a search mattered, for the report: ``<study>/search.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from tune_study.folder.files import write_json

FILE = "search.json"
LEAST_TRIALS = 8
"""Complete trials below which a forest of trees says nothing."""


def write_importances(
    study_dir: Path, study: optuna.Study, objectives: Sequence[str], seed: int
) -> None:
    """search.json: Optuna's trials in numbers, and per objective the parameters' importances."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    content = {
        "format": 1,
        "optuna": optuna.__version__,
        "evaluator": "fANOVA",
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "importances": {
            name: importances(study, complete, index, seed) for index, name in enumerate(objectives)
        },
    }
    write_json(study_dir / FILE, content)


def importances(
    study: optuna.Study, complete: Sequence[FrozenTrial], index: int, seed: int
) -> list[dict[str, Any]] | dict[str, str]:
    """[{parameter, importance, trials}] of one objective, or why there are none.

    fANOVA's share of the variance that a random forest explains by each parameter (Hutter et al.,
    2014). A parameter that only some trials have is set against the common ones among those
    trials alone; ``trials`` counts them.
    """
    if len(complete) < LEAST_TRIALS:
        return {"unavailable": f"{len(complete)} complete trials are too few, 8 are needed"}
    values = [trial.values[index] for trial in complete]
    if max(values) == min(values):
        return {"unavailable": "all trials have the same value"}
    names = list(dict.fromkeys(name for trial in complete for name in trial.params))
    common = [name for name in names if all(name in trial.params for trial in complete)]
    rows = _evaluate(study, complete, common, index, seed)
    found = [
        {"parameter": name, "importance": rows[name], "trials": len(complete)} for name in rows
    ]
    for name in names:
        having = [trial for trial in complete if name in trial.params]
        if name not in common and len(having) >= LEAST_TRIALS:
            value = _evaluate(study, having, [*common, name], index, seed).get(name)
            if value is not None:
                found.append({"parameter": name, "importance": value, "trials": len(having)})
    if not found:
        return {"unavailable": "no parameter varied"}
    return sorted(found, key=lambda row: -row["importance"])


def _evaluate(
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
    names: Sequence[str],
    index: int,
    seed: int,
) -> dict[str, float]:
    """Of the parameters that vary among ``trials``; not a number is left out."""
    varied = [name for name in names if len({trial.params[name] for trial in trials}) > 1]
    if not varied or len({trial.values[index] for trial in trials}) < 2:
        return {}
    found = get_param_importances(
        study,
        evaluator=FanovaImportanceEvaluator(seed=seed),
        params=varied,
        target=lambda trial: trial.values[index],
    )
    return {name: value for name, value in found.items() if math.isfinite(value)}
