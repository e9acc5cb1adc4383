import numpy as np
import pandas as pd

from tune_study.search.importance import importances


def test_importances_find_what_was_planted():
    """Optuna's own trials, in which the learning rate decides and the seed does nothing."""
    import optuna

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
