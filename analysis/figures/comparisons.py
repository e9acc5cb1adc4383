"""The report's comparative figures: each takes a table of the measures, the literature or the
statistics and returns a :class:`Drawn`; one with nothing to show says why instead."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.figures.style import (
    NARROW,
    Drawn,
    called,
    legend_below,
    legend_of_modes,
    new_figure,
    panel_grid,
    panels_of,
    plain_log,
    settings,
    style,
)
from analysis.measures.memory import LEDGER
from analysis.statistics.cells import modes_of
from analysis.text.wording import (
    MISSING,
    between,
    megabytes,
    percent,
    plural,
    points,
    short,
    signed,
    without_shared_ends,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = ("#444444", "#E69F00", "#56B4E9", "#009E73", "#CCCCCC")
_PART_HATCHES = ("", "//", "xx", "..", "")


def plot_forest(table: pd.DataFrame, points: pd.DataFrame, *, title: str, caption: str) -> Drawn:
    """Accuracy difference per mode with its interval, over the values that it rests on.

    ``table`` is ``comparison.compare_modes``; where it has no interval, ``seed_low`` and
    ``seed_high`` may hold one over seeds, which is drawn thin. ``points`` has ``quantization``,
    ``difference`` (fraction) and ``tip``, a row per grey dot.
    """
    shown = table[table["mean_difference"].notna()].reset_index(drop=True)
    if shown.empty:
        reason = "no quantized mode has a finished pair with the unquantized baseline"
        return Drawn("accuracy_difference", title, caption, None, reason)
    tips: dict[str, list[str]] = {}
    rows = shown.to_dict("records")
    labels = [_forest_label(row) for row in rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    with settings():
        figure, axes = new_figure(0.85 + 0.12 * len(rows) + 0.17 * lines, width=NARROW)
        axis = axes[0, 0]
        for place, row in enumerate(rows):
            own = points[points["quantization"] == row["quantization"]]
            _draw_difference(axis, place, row, own, tips)
        axis.axvline(0, color="black", lw=1)
        axis.margins(x=0.06)
        margin = shown["margin"].dropna()
        if len(margin):
            _draw_margin(axis, float(margin.iloc[0]) * 100)
        axis.set_yticks(range(len(rows)), labels)
        axis.set_ylim(len(rows) - 0.4, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("test accuracy minus unquantized, pp")
        for side, (words, end) in enumerate((("← loses", "left"), ("gains →", "right"))):
            axis.text(
                side, 1.02, words, transform=axis.transAxes, ha=end, va="bottom", fontsize=8,
                color="#555555",
            )  # fmt: skip
    return Drawn("accuracy_difference", title, caption, figure, tips=tips)


def _forest_label(row: dict[Any, Any]) -> str:
    """The mode's name, its difference and its interval, no line longer than a phone has room."""
    interval = ""
    if np.isfinite([row["ci_low"], row["ci_high"]]).all():
        interval = f" [{signed(row['ci_low'] * 100)}, {signed(row['ci_high'] * 100)}]"
    name = textwrap.wrap(short(str(row["quantization"]), 52), 29)
    return "\n".join([*name, f"{signed(row['mean_difference'] * 100)} pp{interval}"])


def _draw_difference(
    axis: Axes, place: int, row: dict[Any, Any], own: pd.DataFrame, tips: dict[str, list[str]]
) -> None:
    """A mode's difference, its interval and the values behind it."""
    mode = str(row["quantization"])
    colour, marker, _ = style(mode)
    values = own["difference"].to_numpy("float64") * 100
    offsets = np.linspace(-0.1, 0.1, len(own)) if len(own) > 1 else np.zeros(len(own))
    axis.plot(
        values, place + 0.26 + offsets, ".", color="#9a9a9a", ms=5, mew=0, zorder=2,
        gid=f"values-{place}",
    )  # fmt: skip
    tips[f"values-{place}"] = [str(tip) for tip in own["tip"]]
    ends = [row[name] * 100 for name in ("ci_low", "ci_high")]
    thin = [row.get(name, np.nan) * 100 for name in ("seed_low", "seed_high")]
    if np.isfinite(ends).all():
        axis.plot(ends, [place] * 2, color=colour, lw=2.4, zorder=3)
        axis.plot(ends, [place] * 2, "|", color=colour, ms=9, mew=1.6, zorder=3)
    elif np.isfinite(thin).all():
        axis.plot(thin, [place] * 2, color=colour, lw=1, ls=(0, (3, 2)), zorder=3)
    mean = row["mean_difference"] * 100
    gid = f"mean-{place}"
    axis.plot(mean, place, marker, color=colour, ms=8, mec="white", zorder=4, gid=gid)
    over = between(*ends)
    words = f"{signed(mean)} pp" + ("" if over == MISSING else f", 95 % interval {over}")
    if between(*thin) != MISSING:
        words += f", {between(*thin)} over its seeds"
    pairs = f"{plural(row['n_configurations'], 'configuration')}, {plural(row['n_pairs'], 'pair')}"
    tips[gid] = [f"{mode}: {words}; {row['verdict']}; {pairs}"]


def _draw_margin(axis: Axes, edge: float) -> None:
    """The margin of equivalence, shaded and within the limits of the axis."""
    axis.axvspan(-edge, edge, color="#0072B2", alpha=0.08, lw=0, zorder=0)
    for side in (-edge, edge):
        axis.axvline(side, color="#666666", lw=0.8, ls=(0, (4, 3)))
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, -1.15 * edge), max(high, 1.15 * edge))


def plot_pareto(
    table: pd.DataFrame,
    *,
    key: str,
    title: str,
    caption: str,
    label: str,
    empty: str,
    one: float = 1e6,
    words: Callable[[Any], str] = megabytes,
) -> Drawn:
    """Accuracy against a cost; ``table`` is ``pareto.pareto_front``, a panel per data set.

    ``one`` is the axis' unit in the cost's own; ``words`` says a cost beside a mark.
    """
    if table.empty:
        return Drawn(key, title, caption, None, empty)
    from matplotlib.lines import Line2D

    models = list(dict.fromkeys(str(model) for model in table["model"]))
    table = table.assign(told=table["cost"].map(words), cost=table["cost"] / one)
    panels = panels_of(table, ["dataset"])
    tips: dict[str, list[str]] = {}
    with settings():
        figure, axes = panel_grid(len(panels), 2.1, width=NARROW)
        for axis, ((dataset,), group) in zip(axes, panels, strict=True):
            _draw_cells(axis, group, models, tips)
            axis.set_title(short(dataset))
            axis.margins(y=0.09)
            axis.set_xscale("log")
            low, high = table["cost"].min(), table["cost"].max()
            plain_log(axis.xaxis, low, high)
            pad = max((high / low) ** 0.08, 1.08)
            axis.set_xlim(low / pad, high * pad)
            axis.set_xlabel(label)
        for axis in axes[::2]:
            axis.set_ylabel("test accuracy, %")
        handles, names = legend_of_modes(modes_of(table["quantization"]))
        if len(models) > 1:
            names += map(short, without_shared_ends(models))
            handles += [
                Line2D([], [], color="black", marker="o", ls="", fillstyle=_fill(models, name))
                for name in models
            ]
        handles.append(Line2D([], [], color="#666666", lw=1.2))
        legend_below(figure, handles, [*names, "front"], handlelength=2)
    return Drawn(key, title, caption, figure, tips=tips)


def _draw_cells(
    axis: Axes, group: pd.DataFrame, models: list[str], tips: dict[str, list[str]]
) -> None:
    """The front, a line per configuration through its modes, and a marker per cell."""
    for _, own in group.sort_values("cost").groupby("configuration"):
        axis.plot(own["cost"], own["score"] * 100, color="#d0d0d0", lw=0.7, zorder=1)
    front = group[group["on_front"]].sort_values("cost")
    axis.step(front["cost"], front["score"] * 100, where="post", color="#666666", lw=1.2, zorder=1)
    for (mode, model), cells in group.groupby(["quantization", "model"], observed=True):
        colour, marker, _ = style(str(mode))
        gid = f"cells-{len(tips)}"
        axis.plot(
            cells["cost"], cells["score"] * 100, marker, color=colour, ms=6.5,
            fillstyle=_fill(models, str(model)), mec=colour, mew=1.2, ls="", alpha=0.9, gid=gid,
        )  # fmt: skip
        tips[gid] = [_cell_tip(row) for row in cells.to_dict("records")]


def _fill(models: list[str], model: str) -> Any:
    return ("full", "none", "left", "top", "right", "bottom")[models.index(model) % 6]


def _cell_tip(row: dict[Any, Any]) -> str:
    """A cell in words: what it is, how accurate, how costly."""
    return (
        f"{short(row['configuration'], 100)} · {row['quantization']}: {percent(row['score'], 2)}, "
        f"{row['told']}, {plural(row['n'], 'seed')}" + ("; on the front" if row["on_front"] else "")
    )


def plot_ledger(table: pd.DataFrame) -> Drawn:
    """Stacked parts of a training step per mode, the measured peak marked; a panel per model.

    ``table`` is ``memory.memory_ledger``. Parts nobody measured are left out of the bars.
    """
    key, title = "memory_ledger", "Where the memory of a training step goes"
    caption = "Mean over trials. Parts that nobody measured are left out; the diamond is the "
    caption += "measured peak, which includes temporary buffers."
    if table.empty:
        return Drawn(key, title, caption, None, "no trial recorded its memory")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    scope = [name for name in ("machine", "model", "batch_size", "setting") if name in table]
    panels = panels_of(table, scope)
    known = [name for name in LEDGER if table[name].notna().any()]
    rows = sum(len(group) for _, group in panels)
    with settings():
        figure, axes = new_figure(
            0.75 * len(panels) + 0.27 * rows + 0.7, len(panels), 1,
            gridspec_kw={"height_ratios": [len(group) + 1.2 for _, group in panels]},
        )  # fmt: skip
        for axis, (scope_values, group) in zip(axes.flat, panels, strict=True):
            _draw_bars(axis, group)
            axis.set_title(_scope_title(scope, scope_values), loc="left")
        axes[-1, 0].set_xlabel("MB of one training step")
        handles: list[Any] = [
            Patch(facecolor=_PARTS[i], hatch=_PART_HATCHES[i], edgecolor="white")
            for i, name in enumerate(LEDGER)
            if name in known
        ]
        labels = [LEDGER[name] for name in known]
        if table["peak_train_bytes"].notna().any():
            handles.append(Line2D([], [], marker="d", color="black", ls="", ms=5))
            labels.append("measured peak")
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return Drawn(key, title, caption, figure)


def _draw_bars(axis: Axes, group: pd.DataFrame) -> None:
    """A bar of stacked parts per row of ``group``, and its measured peak."""
    left = np.zeros(len(group))
    for number, name in enumerate(LEDGER):
        width = group[name].astype("float64").fillna(0).to_numpy() / 1e6
        axis.barh(
            range(len(group)), width, left=left, color=_PARTS[number], height=0.62,
            hatch=_PART_HATCHES[number], edgecolor="white", lw=0.3,
        )  # fmt: skip
        left += width
    peak = group["peak_train_bytes"].astype("float64").to_numpy() / 1e6
    axis.plot(peak, range(len(group)), "d", color="black", mec="white", ms=6, zorder=4)
    axis.set_yticks(range(len(group)), [called(mode) for mode in group["quantization"]])
    axis.set_ylim(len(group) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)


def _scope_title(scope: Sequence[str], values: Sequence[str]) -> str:
    named = dict(zip(scope, values, strict=True))
    text = short(named["model"])
    if named.get("batch_size", "<NA>") not in ("<NA>", "nan"):
        text += f", batch {named['batch_size']}"
    return f"{text}, {named['setting']}" if "setting" in named else text


def plot_qlora(table: pd.DataFrame, *, simulated: bool) -> Drawn:
    """Our score ratios with intervals against QLoRA's ranges; ``table`` is ``qlora_ratios``."""
    key, title = "qlora_ratios", "Our ratios and QLoRA's"
    caption = "Score with quantized base weights over the score without, ours with its 95 % "
    caption += "interval over configurations, beside the range of the cells of QLoRA's tables 3 "
    caption += "and 4 (language models)."
    if simulated:
        reason = "a simulated study is not compared with the literature"
        return Drawn(key, title, caption, None, reason)
    shown = table[table["ratio"].notna() & (table["n_reference"] > 0)] if len(table) else table
    if shown.empty:
        return Drawn(
            key, title, caption, None, "no mode has both a ratio of ours and one of theirs"
        )
    from matplotlib.lines import Line2D

    with settings():
        figure, axes = new_figure(1.1 + 0.42 * len(shown))
        axis = axes[0, 0]
        for number, row in enumerate(shown.to_dict("records")):
            colour, marker, _ = style(str(row["quantization"]))
            axis.plot(
                [row["their_low"], row["their_high"]], [number + 0.16] * 2, color="#bdbdbd", lw=7,
                solid_capstyle="butt", zorder=1,
            )  # fmt: skip
            axis.plot(row["their_mean"], number + 0.16, "|", color="black", ms=9, mew=1.6, zorder=2)
            axis.plot([row["ci_low"], row["ci_high"]], [number - 0.16] * 2, color=colour, lw=2.2)
            axis.plot(row["ratio"], number - 0.16, marker, color=colour, ms=5, zorder=4)
        axis.axvline(1, color="black", lw=1)
        labels = [
            f"{short(row['quantization'])}: {short(row['group'], 30)}"
            for row in shown.to_dict("records")
        ]
        axis.set_yticks(range(len(shown)), labels)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("score of quantized over unquantized")
        handles = [
            Line2D([], [], color="#444444", marker="o", lw=2.2),
            Line2D([], [], color="#bdbdbd", lw=7),
            Line2D([], [], color="black", marker="|", ls="", ms=9, mew=1.6),
        ]
        legend_below(figure, handles, ["ours, with interval", "QLoRA's cells, range", "their mean"])
    return Drawn(key, title, caption, figure)


def plot_seeds(table: pd.DataFrame, sds: pd.DataFrame) -> Drawn:
    """Deviation of each trial from the mean of its cell, per mode, with the pooled deviation."""
    key, title = "seed_spread", "How far the seed alone moves a result"
    caption = (
        "Each dot is a trial, set against the mean of its cell (same configuration and mode). "
    )
    caption += "The band is one standard deviation, pooled over the cells."
    if table.empty:
        return Drawn(key, title, caption, None, "no cell has two finished seeds")
    tips: dict[str, list[str]] = {}
    with settings():
        modes = modes_of(sds["quantization"])
        sds = sds.set_index("quantization").loc[modes].reset_index()
        figure, axes = new_figure(0.9 + 0.5 * len(modes))
        axis = axes[0, 0]
        labels = []
        for number, row in enumerate(sds.to_dict("records")):
            mode = str(row["quantization"])
            colour, marker, _ = style(mode)
            own = table.loc[table["quantization"] == mode, "deviation"].to_numpy("float64") * 100
            # A fixed spiral instead of random jitter: the same study draws the same figure.
            offset = 0.26 * np.sin(np.arange(len(own)) * 2.399963)
            sd = row["sd"] * 100
            axis.fill_betweenx([number - 0.34, number + 0.34], -sd, sd, color=colour, alpha=0.13)
            axis.plot(
                own, number + offset, marker, color=colour, ms=4.5, alpha=0.75, mew=0, ls="",
                gid=f"seeds-{number}",
            )  # fmt: skip
            tips[f"seeds-{number}"] = [
                f"{short(trial['configuration'], 100)} · {mode} · seed {trial['seed']}: "
                f"{points(trial['deviation'])} from the mean of its cell"
                for trial in table[table["quantization"] == mode].to_dict("records")
            ]
            labels.append(f"{called(mode)}\nsd {sd:.2f} pp")
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(modes)), labels)
        axis.set_ylim(len(modes) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("test accuracy minus the mean over seeds, pp")
    return Drawn(key, title, caption, figure, tips=tips)
