"""The cost of each mode along every axis, in small multiples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.figures.style import (
    Drawn,
    legend_below,
    legend_of_modes,
    panel_grid,
    settings,
    style,
)
from analysis.statistics.cells import modes_of
from analysis.text.wording import short, without_shared_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 12
_WIDTH = 0.5
"""Of the modes side by side at a level, levels being 1 apart."""


def plot_axes(levels: pd.DataFrame, points: pd.DataFrame) -> Drawn:
    """A panel per axis: levels across, the difference per mode with its interval, over its sets.

    ``levels`` and ``points`` are those of ``dependence.axis_effects``, differences as fractions.
    """
    key, title = "axes", "The cost of each mode at every level"
    caption = (
        "Difference of test accuracy to the unquantized model at each level of each axis, with "
        "the 95 % interval of the comparison of levels; a thin line is a matched set: "
        "configurations that share every other setting. How far these lines are from parallel is "
        "what a dependence must stand out from."
    )
    shown = levels[levels["difference"].notna()]
    if shown.empty:
        reason = "no quantized mode has a finished pair with the unquantized baseline"
        return Drawn(key, title, caption, None, reason)
    modes = modes_of(shown["quantization"])
    names = list(dict.fromkeys(levels["axis"]))[:_MOST_PANELS]
    low, high = _limits(shown, points)
    with settings():
        figure, axes = panel_grid(len(names), 2.5)
        for axis, name in zip(axes, names, strict=True):
            own = points[points["axis"] == name]
            for number, mode in enumerate(modes):
                aside = _WIDTH * ((number + 0.5) / len(modes) - 0.5)
                _draw_sets(axis, own[own["quantization"] == mode], mode, aside)
                at = shown[(shown["axis"] == name) & (shown["quantization"] == mode)]
                _draw_levels(axis, at, mode, aside)
            axis.axhline(0, color="black", lw=1, zorder=1)
            labels = levels[levels["axis"] == name].drop_duplicates("place")
            _name_levels(axis, labels["level"].tolist())
            axis.set_title(short(name))
            axis.set_ylim(low, high)
            axis.grid(axis="x", visible=False)
        for axis in axes[:: min(2, len(axes))]:
            axis.set_ylabel("difference, pp")
        legend_below(figure, *legend_of_modes(modes, lines=True))
    return Drawn(key, title, caption, figure)


def _limits(levels: pd.DataFrame, points: pd.DataFrame) -> tuple[float, float]:
    """Of all panels alike, in pp: what was seen, and of intervals as much again at most."""
    seen = pd.concat([points["difference"], levels["difference"], pd.Series([0.0])]) * 100
    low, high = float(seen.min()), float(seen.max())
    reach = max(high - low, 0.1)
    ends = levels[["ci_low", "ci_high"]].to_numpy("float64").ravel() * 100
    ends = np.clip(ends[np.isfinite(ends)], low - reach, high + reach)
    low, high = min([low, *ends]), max([high, *ends])
    return low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02


def _draw_sets(axis: Axes, points: pd.DataFrame, mode: str, aside: float) -> None:
    """A thin line along the configurations of each matched set."""
    for _, own in points.groupby("set"):
        own = own.sort_values("place")
        axis.plot(
            own["place"] + aside, own["difference"] * 100, color=style(mode)[0], lw=0.7, alpha=0.35,
            marker=".", ms=3, mew=0, zorder=2,
        )  # fmt: skip


def _draw_levels(axis: Axes, levels: pd.DataFrame, mode: str, aside: float) -> None:
    colour, marker, dashes = style(mode)
    across = levels["place"].to_numpy("float64") + aside
    mean, low, high = (
        levels[name].to_numpy("float64") * 100 for name in ("difference", "ci_low", "ci_high")
    )
    axis.vlines(across, low, high, color=colour, lw=2, zorder=3)
    axis.plot(
        across, mean, marker, color=colour, ms=5.5, mec="white", mew=0.6, ls=dashes, lw=1.2,
        zorder=4,
    )  # fmt: skip


def _name_levels(axis: Axes, names: list[str]) -> None:
    """The levels as ticks: without what long names share, slanted where they would meet."""
    words = [short(name, 20) for name in without_shared_ends(names)]
    crowded = max(map(len, words)) * len(words) > 32
    slant: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(range(len(words)), words, **slant)
    axis.set_xlim(-0.5, len(words) - 0.5)
