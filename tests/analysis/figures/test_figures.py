"""The tables behind the figures against slow obvious versions, and what is drawn of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from analysis.figures import comparisons, curves, gallery, style
from analysis.findings import findings
from analysis.folder.configurations import SHORT
from analysis.load import Study
from analysis.measures.curves import curve_bands
from analysis.measures.pareto import pareto_front
from analysis.statistics.cells import pooled_sd, seed_spread
from analysis.statistics.pairs import paired_differences
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> findings.Findings:
    path = synthetic.write_study(tmp_path_factory.mktemp("studies") / "s", effects={"nf4": -0.01})
    trials, epochs = synthetic.study_frames(effects={"nf4": -0.01})
    manifest = json.loads((path / "study.json").read_text())
    return findings.compute(Study(trials, epochs, manifest, [], path))


@pytest.fixture(scope="module")
def drawn(found: findings.Findings) -> dict[str, style.Drawn]:
    return gallery.draw_all(found)


def test_pareto_front_without_a_cost_is_empty_and_says_so() -> None:
    trials, _ = synthetic.study_frames(missing=("peak_train_bytes",))
    table = pareto_front(trials, cost="peak_train_bytes")
    assert table.empty
    empty = comparisons.plot_pareto(
        table, key="k", title="t", caption="c", label="l", empty="nobody measured it"
    )
    assert empty.figure is None
    assert empty.empty == "nobody measured it"


def test_every_figure_is_drawn(drawn: dict[str, style.Drawn]) -> None:
    assert set(drawn) == set(gallery.KEYS)
    assert [key for key, one in drawn.items() if one.figure is None] == []
    assert all(one.title and one.caption for one in drawn.values())


def test_the_forest_draws_the_comparison(
    drawn: dict[str, style.Drawn], found: findings.Findings
) -> None:
    figure = drawn["accuracy_difference"].figure
    assert figure is not None
    axis = figure.axes[0]
    labels = [text.get_text() for text in axis.get_yticklabels()]
    for label, row in zip(labels, found.comparison.to_dict("records"), strict=True):
        assert label.startswith(row["quantization"])
        assert f"{row['mean_difference'] * 100:.2f}".lstrip("-") in label
    marks = [line.get_xdata() for line in axis.lines if line.get_marker() in "s^D"]
    drawn_means = [float(np.ravel(x)[0]) / 100 for x in marks]
    assert drawn_means == pytest.approx(found.comparison["mean_difference"].tolist())


def test_differences_in_the_forest_are_those_of_the_statistics(found: findings.Findings) -> None:
    pairs = paired_differences(found.study.trials)
    means = pairs.groupby([*SHORT, "quantization"])["difference"].mean()
    ours = found.differences.set_index([*SHORT, "quantization"])["difference"]
    pd.testing.assert_series_equal(ours.sort_index(), means.sort_index(), check_dtype=False)


def test_the_gap_is_drawn_over_one_line_at_zero(drawn: dict[str, style.Drawn]) -> None:
    figure = drawn["learning_gap"].figure
    assert figure is not None
    for axis in figure.axes:
        assert sum(list(line.get_ydata()) == [0, 0] for line in axis.lines) == 1


def _texts(one: style.Drawn) -> list[tuple[str, matplotlib.transforms.Bbox]]:
    """Every text that is drawn, with its place in pixels."""
    assert one.figure is not None
    with style.settings():
        one.figure.draw_without_rendering()
        # matplotlib keeps ticks beyond the limits, and does not draw them.
        beyond = {
            id(label)
            for axis in one.figure.axes
            for side in (axis.xaxis, axis.yaxis)
            for tick in [*side.get_major_ticks(), *side.get_minor_ticks()]
            for label in (tick.label1, tick.label2)
            if not min(side.get_view_interval()) <= tick.get_loc() <= max(side.get_view_interval())
        }
        return [
            (text.get_text(), text.get_window_extent())
            for text in one.figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and id(text) not in beyond
            if text.get_in_layout() and text.get_window_extent().width > 0
        ]


@pytest.mark.parametrize("key", gallery.KEYS)
def test_no_text_is_cut_off_or_covers_another(key: str, drawn: dict[str, style.Drawn]) -> None:
    figure, texts = drawn[key].figure, _texts(drawn[key])
    assert figure is not None
    assert len(texts) > 8
    for text, box in texts:
        inside = box.x0 >= -1 and box.y0 >= -1
        inside &= box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{text!r} is cut off"
    for (text, a), (other, b) in itertools.combinations(texts, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 2 or down < 2, f"{text!r} covers {other!r}"


@pytest.mark.parametrize("ratio", [1.02, 1.3, 1.49, 1.6, 3.0, 40.0, 1000.0])
def test_ticks_of_a_logarithmic_axis_keep_apart(ratio: float) -> None:
    with style.settings():
        figure, axes = style.panel_grid(2, 2.7)
        for axis in axes:
            axis.set_xscale("log")
            style.plain_log(axis.xaxis, 268.0, 268.0 * ratio)
            axis.set_xlim(268.0 / 1.08, 268.0 * ratio * 1.08)
        figure.draw_without_rendering()
        for axis in axes:
            low, high = axis.get_xlim()
            shown = [t for t in axis.get_xticklabels() if low <= t.get_position()[0] <= high]
            boxes = [label.get_window_extent() for label in shown]
            assert len(boxes) >= 2
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_modes_differ_without_colour() -> None:
    styles = [style.style(mode) for mode in synthetic.MODES]
    assert len({marker for _, marker, _ in styles}) == len(styles)
    assert len({str(dashes) for _, _, dashes in styles}) == len(styles)


def test_names_are_not_formulas_and_fit(tmp_path: Path) -> None:
    evil = ("$\\frac{1}$ <b>" + "x" * 200,)
    cells = synthetic.plan(models=evil, datasets=("a$b^c_d$",), lora=((4, 8),), seeds=(1, 2))
    trials, epochs = synthetic.study_frames(cells)
    one = curves.plot_curves(
        curve_bands(epochs, trials), key="k", title="t", caption="c", label="l"
    )
    assert style.png(one, dpi=40).startswith(b"\x89PNG")
    assert any("\\frac" in text for text, _ in _texts(one))


def test_simulated_figures_say_so(drawn: dict[str, style.Drawn], tmp_path: Path) -> None:
    trials, epochs = synthetic.study_frames(simulated=True)
    study = Study(trials, epochs, {"study": "s", "simulated": True}, [], None)
    marked = gallery.draw_all(findings.compute(study))
    assert marked["qlora_ratios"].figure is None
    for one in marked.values():
        if one.figure is not None:
            texts = [text.get_text() for text in one.figure.findobj(Text)]
            assert "SIMULATED" in texts
            assert any(text.startswith("simulated:") for text in texts)
    unmarked = drawn["seed_spread"].figure
    assert unmarked is not None
    assert not any("imulated" in text.get_text() for text in unmarked.findobj(Text))


def test_files_are_print_quality_and_reproducible(
    drawn: dict[str, style.Drawn], tmp_path: Path
) -> None:
    import struct

    one = drawn["seed_spread"]
    written = style.save(one, tmp_path / "a")
    assert [path.name for path in written] == ["seed_spread.png", "seed_spread.pdf"]
    png = written[0].read_bytes()
    width = struct.unpack(">I", png[16:20])[0]
    assert width == pytest.approx(style.WIDTH * 300, abs=2)
    assert written[1].read_bytes().startswith(b"%PDF")
    again = style.save(one, tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_an_empty_figure_is_no_file(tmp_path: Path) -> None:
    empty = style.Drawn("k", "t", "c", None, "nothing was measured")
    assert style.save(empty, tmp_path) == []
    with pytest.raises(ValueError, match="nothing was measured"):
        style.png(empty)


def test_matplotlib_keeps_its_settings(frames: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    before = dict(matplotlib.rcParams)
    spread = seed_spread(frames[0])
    one = comparisons.plot_seeds(spread, pooled_sd(spread))
    style.png(one, dpi=40)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("value", "text"), [(2000, "2,000"), (0.02, "0.02"), (50, "50")])
def test_ticks_have_no_exponent(value: float, text: str) -> None:
    assert style.tick(value) == text
