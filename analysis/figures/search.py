"""The figures of a search: the Pareto set, the progress, the importances."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.figures.style import (
    NARROW,
    Drawn,
    legend_below,
    legend_of_modes,
    new_figure,
    plain_log,
    settings,
    style,
)
from analysis.measures.search import Searched
from analysis.statistics.cells import modes_of
from analysis.text.wording import UNITS, name_of, parameter_of, suggestions, value_of

KEYS = ("search_front", "search_progress", "search_importance")
_SCALES = {"fraction": (100.0, "%"), "bytes": (1e-6, "MB")}


def draw(found: Searched) -> list[Drawn]:
    """All three, each with the reason where there is none."""
    return [_front(found), _progress(found), _importance(found)]


def _scale(objective: str) -> tuple[float, str]:
    """Factor and axis label of an objective."""
    factor, unit = _SCALES.get(UNITS[objective], (1.0, UNITS[objective]))
    return factor, f"{name_of(objective)}, {unit}" if unit else name_of(objective)


def _front(found: Searched) -> Drawn:
    key, title = "search_front", "The Pareto set"
    caption = "Each point is a trial; the line joins those that no other beats in both objectives."
    if len(found.objectives) < 2:
        return Drawn(key, title, caption, None, "the search has one objective")
    if found.trials.empty:
        return Drawn(key, title, caption, None, "no trial ended well")
    y, x = found.objectives
    if found.objectives[x] == "maximize":
        y, x = x, y
    (x_scale, x_label), (y_scale, y_label) = _scale(x), _scale(y)
    from matplotlib.lines import Line2D

    modes = modes_of(found.trials["quantization"])
    with settings():
        figure, axes = new_figure(3.0, width=NARROW)
        axis = axes[0, 0]
        front = found.trials[found.trials["on_front"]].sort_values(x)
        tips: dict[str, list[str]] = {}
        where = "post" if found.objectives[y] == "maximize" else "pre"
        axis.step(front[x] * x_scale, front[y] * y_scale, where=where, color="#888888", lw=1)
        for mode in modes:
            colour, marker, _ = style(mode)
            for on_front, alpha, size in ((False, 0.45, 5), (True, 1.0, 8)):
                own = found.trials["quantization"] == mode
                shown = found.trials[own & (found.trials["on_front"] == on_front)]
                if shown.empty:
                    continue
                gid = f"trials-{len(tips)}"
                axis.plot(
                    shown[x] * x_scale, shown[y] * y_scale, marker, color=colour, ms=size,
                    alpha=alpha, mec="white", mew=0.6, ls="", gid=gid,
                )  # fmt: skip
                tips[gid] = _tips(found, shown)
        low, high = found.trials[x].min() * x_scale, found.trials[x].max() * x_scale
        if low > 0 and high > low:
            axis.set_xscale("log")
            plain_log(axis.xaxis, low, high)
            pad = (high / low) ** 0.06
            axis.set_xlim(low / pad, high * pad)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        handles, names = legend_of_modes(modes)
        handles.append(Line2D([], [], color="#888888", lw=1))
        legend_below(figure, handles, [*names, "front"], handlelength=2)
    return Drawn(key, title, caption, figure, tips=tips)


def _tips(found: Searched, trials: pd.DataFrame) -> list[str]:
    """Each trial in words: its number, its objectives, what was suggested."""
    return [
        ", ".join(
            [f"trial {row['number']}: {row['quantization']}"]
            + [f"{name_of(name)} {value_of(name, row[name])}" for name in found.objectives]
        )
        + f"; {suggestions(found.parameters.get(str(row['trial_id']), {}))}"
        for row in trials.to_dict("records")
    ]


def _progress(found: Searched) -> Drawn:
    key, several = "search_progress", len(found.objectives) > 1
    title = "Hypervolume over the trials" if several else "The best so far"
    caption = "How much of the box between the best and the worst value of each objective the "
    caption += "Pareto set dominates, after each trial. A flat end: more trials found no more."
    if not several:
        caption = "The best value after each trial, and the trials. A flat end: more found no more."
    values = found.progress["value"]
    if not np.isfinite(values).any():
        why = "no trial ended well" if found.trials.empty else "an objective has one value only"
        return Drawn(key, title, caption, None, why)
    tips: dict[str, list[str]] = {}
    with settings():
        figure, axes = new_figure(2.3, width=NARROW)
        axis = axes[0, 0]
        numbers = found.progress["number"]
        if several:
            axis.step(numbers, values * 100, where="post", color="#0072B2")
            axis.set_ylabel("hypervolume, %")
            axis.set_ylim(bottom=0)
        else:
            (objective,) = found.objectives
            factor, label = _scale(objective)
            axis.plot(
                found.trials["number"], found.trials[objective] * factor, ".", color="#999999",
                gid="trials",
            )  # fmt: skip
            tips["trials"] = _tips(found, found.trials)
            axis.step(numbers, values * factor, where="post", color="#0072B2")
            axis.set_ylabel(label)
        axis.set_xlabel("trials suggested")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return Drawn(key, title, caption, figure, tips=tips)


def _importance(found: Searched) -> Drawn:
    key, title = "search_importance", "What mattered"
    caption = "Share of the variance between trials that a random forest explains by each "
    caption += "parameter (fANOVA); the rest is interaction and chance."
    table = found.importances
    if table.empty:
        return Drawn(key, title, caption, None, "; ".join(found.unavailable.values()) or "none")
    names = list(dict.fromkeys(table["parameter"]))
    objectives = [name for name in found.objectives if (table["objective"] == name).any()]
    colours, hatches = ("#0072B2", "#E69F00"), ("", "//")
    with settings():
        figure, axes = new_figure(0.9 + 0.22 * len(names) * len(objectives))
        axis = axes[0, 0]
        height = 0.8 / len(objectives)
        for index, objective in enumerate(objectives):
            own = table[table["objective"] == objective].set_index("parameter")["importance"]
            places = np.arange(len(names)) + (index - (len(objectives) - 1) / 2) * height
            axis.barh(
                places, own.reindex(names).fillna(0) * 100, height=height, color=colours[index],
                hatch=hatches[index], edgecolor="white", label=name_of(objective),
            )  # fmt: skip
        axis.set_yticks(range(len(names)), [parameter_of(name) for name in names])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("share of the variance, %")
        legend_below(figure, *axis.get_legend_handles_labels())
    return Drawn(key, title, caption, figure)
