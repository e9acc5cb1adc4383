import json

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from tune_study.search import importance
from tune_study.search.importance import importances


def test_importances_find_what_was_planted():
    """Optuna's own trials, in which the learning rate decides and the seed does nothing."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = asked.ask()
        rate = trial.suggest_float("training.learning_rate", 1e-4, 1e-2, log=True)
        trial.suggest_int("seed", 0, 9)
        asked.tell(trial, np.log(rate))
    rows = importances(asked, asked.trials, 0, seed=0)
    assert isinstance(rows, list)
    table = pd.DataFrame(rows).set_index("parameter")["importance"]
    assert table["training.learning_rate"] > 0.9
    assert table["seed"] < 0.1
    few = importances(asked, asked.trials[:3], 0, seed=0)
    assert few == {"unavailable": "3 complete trials are too few, 8 are needed"}


def trial(values, **params):
    asked = dict.fromkeys(params, FloatDistribution(0, 100))
    return create_trial(values=values, params=params, distributions=asked)


@pytest.fixture
def evaluated(monkeypatch):
    """fANOVA replaced: each parameter's place in the call is its importance."""
    calls = []

    def evaluate(study, *, evaluator, params, target):
        calls.append((list(params), target(trial([5.0, 7.0], a=1.0))))
        return {name: float(place) for place, name in enumerate(params, start=1)}

    monkeypatch.setattr(importance, "get_param_importances", evaluate)
    return calls


def test_a_parameter_that_only_some_trials_have_is_counted_among_those(evaluated):
    """Eight trials have b, seven have c, and e never varies."""
    trials = [
        trial([1.0, float(n)], a=float(n), e=3.0, **({"b": float(n)} if n < 8 else {"c": 1.0 * n}))
        for n in range(15)
    ]
    assert importances(None, trials, 0, seed=0) == {"unavailable": "all trials have the same value"}
    assert importances(None, trials, 1, seed=0) == [
        {"parameter": "b", "importance": 2.0, "trials": 8},
        {"parameter": "a", "importance": 1.0, "trials": 15},
    ]
    assert evaluated == [(["a"], 7.0), (["a", "b"], 7.0)]


def test_eight_trials_are_enough_and_seven_are_not(evaluated):
    trials = [trial([float(n)], a=float(n)) for n in range(8)]
    assert importances(None, trials, 0, seed=0) == [
        {"parameter": "a", "importance": 1.0, "trials": 8}
    ]
    assert "unavailable" in importances(None, trials[1:], 0, seed=0)
    same = [trial([float(n)], a=2.0) for n in range(8)]
    assert importances(None, same, 0, seed=0) == {"unavailable": "no parameter varied"}


def test_search_json_counts_the_trials_by_their_end(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    for n in range(3):
        study.add_trial(trial([0.5, n], a=1.0))
    for state in (TrialState.FAIL, TrialState.RUNNING, TrialState.FAIL):
        study.add_trial(create_trial(state=state))
    importance.write_importances(tmp_path, study, ("val_accuracy", "weights_bytes"), 0)
    few = {"unavailable": "3 complete trials are too few, 8 are needed"}
    assert json.loads((tmp_path / "search.json").read_text()) == {
        "format": 1,
        "optuna": optuna.__version__,
        "evaluator": "fANOVA",
        "trials": {"complete": 3, "fail": 2, "running": 1},
        "importances": {"val_accuracy": few, "weights_bytes": few},
    }
