"""The decision table of a search: each line rests on a single trial."""

from __future__ import annotations

import pandas as pd

from analysis.findings.decisions import Decision
from analysis.measures.pareto import costs_of
from analysis.measures.search import Searched
from analysis.text.wording import name_of, percent, suggestions, value_of

BEST = {
    "val_accuracy": "You want the best validation accuracy",
    "weights_bytes": "You want the smallest base weights",
    "peak_train_bytes": "You want the lowest peak of a training step",
    "train_time_s": "You want the shortest training",
}
TOLERANCE = 0.01


def in_words(found: Searched, trial_id: str) -> str:
    """What was suggested for a trial, in one line."""
    return suggestions(found.parameters.get(trial_id, {})) or trial_id


def decide(found: Searched) -> list[Decision]:
    """The lines of the decision table. None is called decided: each rests on a single trial."""
    if found.trials.empty:
        return [
            Decision("You want the best trial", "not decided", "no trial ended well yet", "", False)
        ]
    costs = pd.DataFrame(costs_of(found.trials, found.objectives), columns=list(found.objectives))
    lines = []
    for objective in found.objectives:
        others = [name for name in found.objectives if name != objective]
        row = found.trials.loc[costs.sort_values([objective, *others]).index[0]]
        lines.append(_line(found, BEST.get(objective, f"You want the best {objective}"), row))
    if "val_accuracy" in found.objectives and len(found.objectives) == 2:
        (cost,) = (name for name in found.objectives if name != "val_accuracy")
        enough = found.trials["val_accuracy"] >= found.trials["val_accuracy"].max() - TOLERANCE
        row = found.trials.loc[costs[enough].sort_values([cost, "val_accuracy"]).index[0]]
        question = f"You accept a loss of {TOLERANCE * 100:g} pp of validation accuracy"
        lines.append(_line(found, question, row))
    return lines


def _line(found: Searched, question: str, row: pd.Series) -> Decision:
    values = [f"{name_of(name)} {value_of(name, row[name])}" for name in found.objectives]
    test = f"test accuracy {percent(row['test_accuracy'], 2)}"
    evidence = f"{', '.join(values)}; {test}. {in_words(found, str(row['trial_id']))}."
    sample = f"the best of {len(found.trials)}, one seed"
    answer = f"trial {row['number']}: {row['quantization']}"
    return Decision(question, answer, evidence, sample, False)
