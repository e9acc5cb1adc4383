"""Figures over epochs: learning curves, gradient norms, and gradients per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.figures.style import (
    Drawn,
    called,
    legend_below,
    legend_of_modes,
    panel_grid,
    panels_of,
    plain_log,
    settings,
    style,
)
from analysis.statistics.cells import modes_of
from analysis.text.layout import clean
from analysis.text.wording import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_MODES = 16
"""Panels of the layers' gradients, one per treatment."""
_MOST_BANDS = 6
"""More bands on one another hide the means."""


def plot_curves(
    table: pd.DataFrame, *, key: str, title: str, caption: str, label: str, scale: float = 1.0,
    log: bool = False, zero: bool = False, empty: str = "",
) -> Drawn:  # fmt: skip
    """Mean and band per mode over epochs; ``table`` is ``curve_bands`` or ``curve_gaps``.

    ``empty`` is the reason to give when there is nothing to draw; ``zero`` draws a line at 0.
    """
    if table.empty:
        return Drawn(key, title, caption, None, empty)
    from matplotlib.ticker import MaxNLocator

    panels = panels_of(table, ["model", "dataset"])
    with settings():
        figure, axes = panel_grid(len(panels), 2.3)
        modes = modes_of(table["quantization"])
        bands = len(modes) <= _MOST_BANDS
        for axis, ((model, dataset), group) in zip(axes, panels, strict=True):
            for mode, line in group.groupby("quantization", observed=True, sort=False):
                _draw_mode(axis, str(mode), line.sort_values("epoch"), scale, log, bands)
            axis.set_title(f"{short(model)}\n{short(dataset)}")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axis.set_xlabel("epoch")
            axis.set_ylabel(label)
            if zero:
                axis.axhline(0, color="black", lw=0.8, zorder=1)
            if log:
                axis.set_yscale("log")
                plain_log(axis.yaxis, *axis.get_ylim())
        legend_below(figure, *legend_of_modes(modes, lines=True, ms=4))
    return Drawn(key, title, caption, figure)


def _draw_mode(
    axis: Axes, mode: str, line: pd.DataFrame, scale: float, log: bool, band: bool
) -> None:
    """One mode's mean and its band; a logarithmic axis has no room for a band down to zero."""
    colour, marker, dashes = style(mode)
    x, mean = line["epoch"].to_numpy("float64"), line["mean"].to_numpy() * scale
    sd = line["sd"].fillna(0).to_numpy() * scale
    low = np.maximum(mean - sd, np.min(mean) * 0.3) if log else mean - sd
    if band:
        axis.fill_between(x, low, mean + sd, color=colour, alpha=0.13, lw=0)
    axis.plot(
        x, mean, color=colour, ls=dashes, marker=marker, ms=3.5, markevery=max(1, len(x) // 5)
    )


def plot_layers(table: pd.DataFrame) -> Drawn:
    """Per-layer gradient norm over epochs; ``table`` is ``measures.curves.layer_gradients``."""
    key, title = "gradient_layers", "Gradient norm per layer"
    caption = "Both LoRA matrices of a layer together, mean over trials, logarithmic; the first "
    caption += "layer is on top."
    if len(table):
        caption += f" Model: {clean(str(table['model'].iloc[0]))}."
    positive = table[table["norm"].astype("float64") > 0] if len(table) else table
    if positive.empty:
        return Drawn(key, title, caption, None, "no gradients.json holds per-layer norms")
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    panels = panels_of(table, ["quantization"], _MOST_MODES)
    low, high = float(positive["norm"].min()), float(positive["norm"].max())
    if low == high:
        low, high = low / 1.1, high * 1.1
    norm = LogNorm(low, high)
    names = table.drop_duplicates("layer").sort_values("layer")["name"].tolist()
    with settings():
        figure, axes = panel_grid(len(panels), 2.6)
        for number, ((mode,), group) in enumerate(panels):
            axis = axes[number]
            grid = group.pivot_table(index="layer", columns="epoch", values="norm", dropna=False)
            grid = grid.reindex(range(len(names)))
            data = np.ma.masked_less_equal(np.ma.masked_invalid(grid.to_numpy("float64")), 0)
            image = axis.imshow(
                data, aspect="auto", norm=norm, cmap="cividis", interpolation="nearest",
                extent=(0.5, len(grid.columns) + 0.5, len(names) - 0.5, -0.5),
            )  # fmt: skip
            axis.set_title(called(mode))
            axis.set_xlabel("epoch")
            axis.grid(visible=False)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            ticks = np.unique(
                np.linspace(0, len(names) - 1, min(len(names), 7)).round().astype(int)
            )
            axis.set_yticks(ticks, [short(names[t], 24) for t in ticks], fontsize=7)
            if number % 2:
                axis.set_yticklabels([])
        bar = figure.colorbar(
            image, ax=axes, label="mean gradient norm", location="bottom", shrink=0.7, aspect=40
        )
        plain_log(bar.ax.xaxis, low, high)
    return Drawn(key, title, caption, figure)
