"""The report of a search: what to take from it, its Pareto set, and what mattered."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.measures.search import Searched
from analysis.text.layout import Section, Table, table_of, text
from analysis.text.wording import (
    listing,
    name_of,
    parameter_of,
    percent,
    plural,
    suggested,
    value_of,
)

METHODS = (
    "Trials were suggested one by one by Optuna's TPE sampler, seeded, from those before them. The "
    "hypervolume is that of the Pareto set up to the worst value of each objective seen, as a "
    "fraction of the box between worst and best."
)


def front_table(found: Searched) -> Table:
    """The Pareto set, best first by the first objective."""
    first, direction = next(iter(found.objectives.items()))
    front = found.trials[found.trials["on_front"]]
    front = front.sort_values(first, ascending=direction == "minimize")
    names = list(dict.fromkeys(name for params in found.parameters.values() for name in params))
    cells: dict[str, Any] = {"trial": lambda row: str(row["number"])}
    cells |= {name_of(n): _cell(n) for n in found.objectives}
    cells["test accuracy"] = _cell("test_accuracy")
    for name in names:
        cells[parameter_of(name)] = _parameter(found, name)
    cells["trial id"] = text("trial_id")
    caption = (
        "The Pareto set: trials that no other beats" if len(found.objectives) > 1 else "The best"
    )
    return table_of("pareto_set", caption, front, cells, note=_note(found), wide=(len(cells) - 1,))


def _cell(name: str) -> Any:
    return lambda row: value_of(name, row[name])


def _parameter(found: Searched, name: str) -> Any:
    return lambda row: suggested(found.parameters.get(str(row["trial_id"]), {}).get(name))


def _note(found: Searched) -> str:
    return (
        f"The best of {plural(len(found.trials), 'trial')} looks better than it is, for it was "
        "chosen by its validation accuracy; the test accuracy did not choose. Trials are numbered "
        "as they were suggested. A dash: not asked."
    )


def section(found: Searched, trials: pd.DataFrame) -> Section:
    """The chapter on the search."""
    goals = listing([f"{direction} {name_of(n)}" for n, direction in found.objectives.items()])
    pruned = int((trials["status"] == "pruned").sum())
    paragraphs = [
        f"Optuna was asked to {goals}. {len(trials)} of {plural(found.num_samples, 'trial')} were "
        f"suggested; {len(found.trials)} ended well with all that was searched for"
        + (f", {pruned} were pruned" if pruned else "")
        + ".",
        "Its trials differ in much more than the quantization mode, and each has one seed: no mode "
        "is set against another here. To decide between a few of them, run a grid over seeds.",
    ]
    if found.left_out:
        paragraphs.append(
            f"{plural(found.left_out, 'trial')} ran with more or fewer trials on the device than "
            "most did. Times are not comparable across that, and these trials are left out here, "
            "but for how much each parameter mattered."
        )
    tables = []
    if len(found.importances):
        tables.append(_importances(found))
    paragraphs += [
        f"How much each parameter mattered for the {name_of(name)} is not known: {why}."
        for name, why in found.unavailable.items()
    ]
    figures = ("search_front", "search_progress", "search_importance")
    shown = figures if len(found.objectives) > 1 else figures[1:]
    return Section("search", "The search", paragraphs, tables, shown)


def _importances(found: Searched) -> Table:
    table = found.importances
    rows = table.pivot(index="parameter", columns="objective", values="importance")
    rows["trials"] = table.groupby("parameter")["trials"].max()
    rows = rows.sort_values(str(table["objective"].iloc[0]), ascending=False).reset_index()
    cells: dict[str, Any] = {"parameter": lambda row: parameter_of(row["parameter"])}
    for name in found.objectives:
        if name in rows:
            cells[f"share for the {name_of(name)}"] = _share(name)
    cells["trials"] = text("trials")
    return table_of(
        "importances",
        "How much each parameter mattered",
        rows,
        cells,
        note="fANOVA: the share of the variance between trials that a random forest explains by "
        "the parameter. One that only some trials have is judged among those alone.",
    )


def _share(name: str) -> Any:
    return lambda row: percent(row[name], 0)
