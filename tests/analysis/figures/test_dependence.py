"""The small multiples of the cost along every axis."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.figures import dependence, style
from analysis.statistics.dependence import AxisEffects, axis_effects
from tests import synthetic


@pytest.fixture(scope="module")
def effects() -> AxisEffects:
    trials, _ = synthetic.study_frames(effects={"nf4": -0.01}, epochs=1)
    return axis_effects(trials)


def drawn(effects: AxisEffects) -> style.Drawn:
    return dependence.plot_axes(effects.levels, effects.points)


def test_a_panel_per_axis_shows_levels_intervals_and_sets(effects: AxisEffects) -> None:
    figure = drawn(effects).figure
    assert figure is not None
    panels = [axis for axis in figure.axes if axis.get_visible()]
    titles = ["model", "data set", "LoRA rank and alpha"]
    assert [axis.get_title() for axis in panels] == titles
    ticks = [[text.get_text() for text in axis.get_xticklabels()] for axis in panels]
    assert ticks == [["deit_tiny", "deit_small"], ["cifar10", "cifar100"],
                     ["4 / 8", "8 / 16", "16 / 32"]]  # fmt: skip
    assert len({axis.get_ylim() for axis in panels}) == 1
    for axis, title in zip(panels, titles, strict=True):
        own = effects.levels[effects.levels["axis"] == title]
        thick = [line for line in axis.lines if line.get_marker() in {"s", "^", "D"}]
        means = np.concatenate([np.asarray(line.get_ydata()) for line in thick])
        assert means / 100 == pytest.approx(own["difference"].to_numpy())
        bars = [path.vertices[:, 1] for bar in axis.collections for path in bar.get_paths()]
        assert np.array(bars) / 100 == pytest.approx(own[["ci_low", "ci_high"]].to_numpy())
        points = effects.points[effects.points["axis"] == title]
        thin = [line for line in axis.lines if line.get_marker() == "."]
        assert len(thin) == len(points.groupby(["quantization", "set"]))
        assert sum(len(np.asarray(line.get_ydata())) for line in thin) == len(points)


def test_an_endless_interval_does_not_flatten_the_panel(effects: AxisEffects) -> None:
    levels = effects.levels.assign(ci_low=-9.0, ci_high=9.0)
    figure = drawn(effects._replace(levels=levels)).figure
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    seen = effects.points["difference"].abs().max() * 100
    assert high - low < 10 * seen


def test_without_a_pair_it_says_so() -> None:
    trials, _ = synthetic.study_frames(failures=dict.fromkeys(range(144), "pending"), epochs=1)
    assert "no quantized mode has a finished pair" in drawn(axis_effects(trials)).empty
