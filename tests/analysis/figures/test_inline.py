"""Figures inside the page: each point tells what it is, and nothing leaves its own element."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pandas as pd
import pytest

from analysis.figures import comparisons, gallery, inline, style
from analysis.findings import findings
from analysis.load import Study
from tests import synthetic

EVIL = '</title><script>a()</script>&amp; " onload=a() \u202e]]>'


@pytest.fixture(scope="module")
def drawn() -> dict[str, style.Drawn]:
    cells = synthetic.plan(models=("deit_tiny_patch16_224", EVIL))
    trials, epochs = synthetic.study_frames(cells, effects={"nf4": -0.01})
    return gallery.draw_all(findings.compute(Study(trials, epochs, {"study": "s"}, [], None)))


def _titles(element: str) -> list[str]:
    root = ElementTree.fromstring(element)
    return [title.text or "" for title in root.iter("title")]


@pytest.mark.parametrize(
    ("key", "points"),
    [("accuracy_difference", 3 * 12 + 3), ("pareto_weights", 48), ("pareto_peak", 48),
     ("seed_spread", 144)],
)  # fmt: skip
def test_each_point_tells_what_it_is(drawn: dict[str, style.Drawn], key: str, points: int) -> None:
    titles = _titles(inline.svg_element(drawn[key]))
    told = [tip for tips in drawn[key].tips.values() for tip in tips]
    assert len(told) == points
    # Markers that are filled by half are drawn twice.
    assert set(titles) == {tip.replace("\u202e", " ") for tip in told}
    assert all(any(mode in title for mode in synthetic.MODES) for title in titles)


def test_a_point_tells_its_own_cell(drawn: dict[str, style.Drawn]) -> None:
    root = ElementTree.fromstring(inline.svg_element(drawn["pareto_weights"]))
    heights: dict[str, list[tuple[float, float]]] = {}
    for mark in root.iter("use"):
        title = mark.find("title")
        if title is not None and title.text:
            percent = re.search(r"([\d.]+) %", title.text)
            assert percent is not None
            panel = "cifar100" if "cifar100" in title.text else "cifar10"
            heights.setdefault(panel, []).append((float(percent[1]), -float(mark.attrib["y"])))
    assert len(heights) == 2
    for pairs in heights.values():
        assert sorted(pairs) == sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def test_nothing_of_it_leaves_its_element(drawn: dict[str, style.Drawn]) -> None:
    ids: list[str] = []
    for key in ("accuracy_difference", "pareto_weights", "pareto_peak", "seed_spread"):
        element = inline.svg_element(drawn[key])
        root = ElementTree.fromstring(element)
        tags = {one.tag for one in root.iter()}
        assert tags <= {"svg", "g", "defs", "path", "use", "text", "title", "clipPath", "rect",
                        "tspan"}  # fmt: skip
        own = [one.attrib["id"] for one in root.iter() if "id" in one.attrib]
        links = re.findall(r'(?:url\(|href=")#([\w.-]+)', element)
        assert set(links) == set(own)
        assert all(name.startswith(f"{key}-") for name in own)
        ids += own
    assert len(ids) == len(set(ids))


def test_names_stay_text(drawn: dict[str, style.Drawn]) -> None:
    element = inline.svg_element(drawn["seed_spread"])
    assert "<script" not in element
    assert "\u202e" not in element
    assert "&lt;/title&gt;&lt;script&gt;" in element


def test_the_same_figure_is_the_same_element(drawn: dict[str, style.Drawn]) -> None:
    assert inline.svg_element(drawn["seed_spread"]) == inline.svg_element(drawn["seed_spread"])


def test_points_without_words_are_refused(drawn: dict[str, style.Drawn]) -> None:
    one = drawn["seed_spread"]
    for tips in ({"seeds-0": ["a"] * 7}, {"nothing": ["a"]}, {"seeds-0": []}):
        with pytest.raises(ValueError, match="seed_spread"):
            inline.svg_element(one._replace(tips=tips))


def test_too_many_points_or_none_are_an_image(drawn: dict[str, style.Drawn]) -> None:
    one = drawn["seed_spread"]
    assert inline.has_points(one)
    assert inline.has_points(one._replace(tips={"a": ["x"] * inline.MOST_POINTS}))
    assert not inline.has_points(one._replace(tips={"a": ["x"] * (inline.MOST_POINTS + 1)}))
    assert not inline.has_points(one._replace(figure=None))
    assert not inline.has_points(drawn["learning_curves"])


def test_one_configuration_is_drawn_over_its_seeds() -> None:
    cells = synthetic.plan(models=("deit_tiny_patch16_224",), datasets=("cifar10",), lora=((4, 8),))
    trials, epochs = synthetic.study_frames(cells)
    found = findings.compute(Study(trials, epochs, {"study": "s"}, [], None))
    one = gallery.draw_all(found)["accuracy_difference"]
    assert [len(tips) for gid, tips in one.tips.items() if gid.startswith("values")] == [3, 3, 3]
    assert one.figure is not None
    dashed = [line for line in one.figure.axes[0].lines if line.get_linestyle() == "--"]
    assert len([line for line in dashed if len(set(line.get_ydata())) == 1]) == 3
    assert "Dashed: the 95 % interval" in one.caption


def test_many_treatments_with_long_names_fit() -> None:
    names = [
        f"nf4 without blocks {i}, {i + 20}-{i + 99} and patterns of our own" for i in range(13)
    ]
    rows = [
        {"quantization": name, "mean_difference": -0.001 * i, "ci_low": -0.02, "ci_high": 0.01,
         "margin": 0.01, "verdict": "undecided", "n_configurations": 2, "n_pairs": 6}
        for i, name in enumerate(names)
    ]  # fmt: skip
    points = pd.DataFrame({"quantization": names, "difference": 0.001, "tip": "x"})
    one = comparisons.plot_forest(pd.DataFrame(rows), points, title="t", caption="c")
    assert one.figure is not None
    with style.settings():
        one.figure.draw_without_rendering()
        labels = [text.get_window_extent() for text in one.figure.axes[0].get_yticklabels()]
    assert min(box.x0 for box in labels) >= -1
    assert one.figure.axes[0].get_position().width > 0.35
    for above, below in itertools.pairwise(labels):
        assert above.y0 >= below.y1 - 1
