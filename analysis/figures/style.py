"""How every figure looks and is saved: styles of the modes, panels, legends, files.

Colour-blind-safe (Okabe and Ito), and every mode has its own marker and line style, so that a grey
print still tells them apart. Nothing here touches matplotlib's global state, and matplotlib is
imported when a figure is made, not before.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.text.wording import short
from tune_study.folder.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 5.2
"""Inches: 9 pt text stays readable when a phone shows the figure 390 px wide."""
NARROW = 4.2
"""Inches, of the figures on the first screen: larger text on a phone, and beside the table."""
SCREEN_DPI, PRINT_DPI = 150, 300
_STYLES = {
    "none": ("#444444", "o", "-"),
    "int8": ("#0072B2", "s", "--"),
    "nf4": ("#D55E00", "^", "-."),
    "nf4-dq": ("#009E73", "D", ":"),
    "fp4": ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))),
    "fp4-dq": ("#E69F00", "P", (0, (1, 3))),
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "8")
_DASHES: tuple[Any, ...] = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-")
_OTHERS: ContextVar[tuple[str, ...]] = ContextVar("_OTHERS", default=())
_MOST_PANELS = 6
_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # the same figure has the same ids
    "figure.facecolor": "white",
    "text.parse_math": False,  # a model called $x$ is a name, not a formula
    "axes.unicode_minus": True,
}


class Drawn(NamedTuple):
    """One figure of the report; ``figure`` is ``None`` when ``empty`` says why there is none."""

    key: str
    title: str
    caption: str
    figure: Figure | None
    empty: str = ""
    simulated: bool = False
    tips: Mapping[str, Sequence[str]] = {}
    """What the points of an artist tell when pointed at, in their order, by the artist's gid."""


@contextmanager
def styles_of(treatments: Sequence[str]) -> Iterator[None]:
    """While the figures of a study are drawn: all its treatments, so that each looks its own."""
    token = _OTHERS.set(tuple(name for name in treatments if name not in _STYLES))
    try:
        yield
    finally:
        _OTHERS.reset(token)


def style(treatment: str) -> tuple[str, str, Any]:
    """Colour, marker and line style of a treatment.

    A mode has those of every report. Settings within a mode get colours from dark to light in
    their order, and no two of a dozen the same marker and line.
    """
    if treatment in _STYLES:
        return _STYLES[treatment]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    others = _OTHERS.get()
    place = others.index(treatment) if treatment in others else 0
    colour = to_hex(colormaps["plasma"](0.85 * place / max(len(others) - 1, 1)))
    return colour, _MARKERS[place % len(_MARKERS)], _DASHES[place % len(_DASHES)]


def called(treatment: str) -> str:
    """A treatment's name as a figure has room for it."""
    return short(treatment, 34)


@contextmanager
def settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(
    height: float, rows: int = 1, columns: int = 1, *, width: float = WIDTH, **shared: Any
) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.set(w_pad=0.09, h_pad=0.08)  # type: ignore[call-arg]
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def legend_below(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], handlelength: float = 3.2
) -> None:
    """In as many columns as the figure has room for, four at most; it grows with many rows."""
    if not handles:
        return
    room = figure.get_figwidth() * 72 - 16
    own = handlelength * 8 + 18  # points beside a label: its handle, and the gaps
    widths = [len(label) * 5.2 + own for label in labels]
    # matplotlib fills column after column, each as wide as its widest.
    fits = (n for n in (4, 3, 2) if sum(map(max, _columns(widths, n))) < room)
    columns = next(fits, 1)
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(rows - 2, 0))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=handlelength,
        columnspacing=1.4,
    )  # fmt: skip


def _columns(widths: Sequence[float], count: int) -> list[list[float]]:
    return [list(part) for part in np.array_split(widths, min(count, len(widths)))]


def legend_of_modes(
    modes: Sequence[str], *, lines: bool = False, **options: Any
) -> tuple[list[Any], list[str]]:
    """Handles and labels of the marks of treatments, and of their ``lines``."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=mark, ls=dashes if lines else "", **options)
        for colour, mark, dashes in map(style, modes)
    ]
    return handles, [called(mode) for mode in modes]


def panels_of(
    table: pd.DataFrame, keys: Sequence[str], most: int = _MOST_PANELS
) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    grouped = table.groupby(list(keys), observed=True, sort=False, dropna=False)
    return [(tuple(str(part) for part in key), group) for key, group in grouped][:most]


def panel_grid(count: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, two in a row."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = new_figure(height * rows + 0.5, rows, columns, **options)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def plain_log(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis at round numbers, written out: 5, 10, 20, 50."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    steps: tuple[float, ...] = (1, 2, 5) if high / low < 300 else (1,)
    if high / low < 4:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8)
    narrow = high / low < 1.5  # as good as linear
    axis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def tick(value: float) -> str:
    """A tick's number without an exponent: 2,000 and 0.02."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def mark_simulated(drawn: Drawn) -> Drawn:
    """The same figure with a word across it that no crop or print can miss."""
    if drawn.figure is not None and not drawn.simulated:
        drawn.figure.text(
            0.5, 0.5, "SIMULATED", fontsize=44, color="#D55E00", alpha=0.13, rotation=24,
            ha="center", va="center", weight="bold", zorder=50, in_layout=False,
        )  # fmt: skip
        with settings():
            drawn.figure.suptitle(
                "simulated: drawn from a model, not trained",
                fontsize=8, color="#a33c00", weight="bold",
            )  # fmt: skip
    return drawn._replace(simulated=True)


def png(drawn: Drawn, *, dpi: int = SCREEN_DPI) -> bytes:
    """The figure as PNG. Raises ``ValueError`` for an empty one."""
    return _render(drawn, "png", dpi)


def svg(drawn: Drawn) -> bytes:
    """The figure as SVG, its texts as text. Raises ``ValueError`` for an empty one."""
    return _render(drawn, "svg", 72)


def _render(drawn: Drawn, kind: str, dpi: int) -> bytes:
    if drawn.figure is None:
        raise ValueError(f"figure {drawn.key} is empty: {drawn.empty}")
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    dated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": nothing}
    with settings():
        if drawn.figure.get_layout_engine() is not None:
            # Laid out once: the engine would repeat it, the slowest part, for every file.
            drawn.figure.draw_without_rendering()
            drawn.figure.set_layout_engine("none")
        drawn.figure.savefig(buffer, format=kind, dpi=dpi, metadata=dated[kind])
    return buffer.getvalue()


def save(drawn: Drawn, folder: Path) -> list[Path]:
    """``key.png`` at 300 dpi and ``key.pdf`` under ``folder``, each whole or not at all."""
    if drawn.figure is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{drawn.key}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        write_bytes(path, _render(drawn, path.suffix[1:], PRINT_DPI))
    return paths
