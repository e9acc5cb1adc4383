"""The chapter on what the cost depends on."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.chapters import dependence
from analysis.chapters.page import make_page
from analysis.findings import findings, summary
from analysis.load import Study
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)
ROW = {
    "axis": "learning rate", "quantization": "nf4", "unit": "per tenfold", "estimate": -0.002,
    "ci_low": -0.009, "ci_high": 0.005, "lowest": "0.01", "highest": "0.0001", "gap": 0.02,
    "gap_low": -0.01, "gap_high": 0.05, "p": 0.4, "p_bend": 0.5, "p_holm": 0.9,
    "p_bend_holm": 0.9, "confidence": 0.95, "margin": 0.01, "verdict": "within the margin",
    "note": "",
}  # fmt: skip


def said(*changes: dict[str, object]) -> str:
    return dependence.sentence("learning rate", pd.DataFrame([ROW | own for own in changes]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "What nf4 costs does not seem to depend on the learning rate: −0.20 pp per tenfold "
            "(−0.90 to +0.50).",
        ),
        (
            {"verdict": "undecided"},
            "Whether what nf4 costs depends on the learning rate is open: −0.20 pp per tenfold "
            "(−0.90 to +0.50).",
        ),
        (
            {"verdict": "depends", "p_holm": 0.01},
            "What nf4 costs depends on the learning rate: −0.20 pp per tenfold (−0.90 to +0.50).",
        ),
        (
            {"verdict": "depends", "p_bend_holm": 0.01},
            "What nf4 costs depends on the learning rate: −0.20 pp per tenfold (−0.90 to +0.50), "
            "but not along a line: most accurate at 0.0001, least at 0.01, 2.00 pp apart.",
        ),
        (
            {"verdict": "undecided", "unit": ""},
            "Whether what nf4 costs depends on the learning rate is open: −0.20 pp for 0.0001 "
            "against 0.01 (−0.90 to +0.50).",
        ),
        (
            {"verdict": "cannot be inferred", "note": "One matched set: nothing tells."},
            "Whether what nf4 costs depends on the learning rate cannot be told. One matched set: "
            "nothing tells.",
        ),
    ],
)
def test_a_sentence_says_what_the_test_found(changes: dict[str, object], expected: str) -> None:
    assert said(changes) == expected


def test_modes_of_one_verdict_share_a_sentence_and_findings_come_first() -> None:
    text = said(
        {"quantization": "int8"},
        {"quantization": "nf4", "verdict": "depends", "p_holm": 0.01},
        {"quantization": "nf4-dq"},
    )
    assert text == (
        "What nf4 costs depends on the learning rate: −0.20 pp per tenfold (−0.90 to +0.50). "
        "What int8 and nf4-dq cost does not seem to depend on it (per tenfold): int8 −0.20 pp "
        "(−0.90 to +0.50), nf4-dq −0.20 pp (−0.90 to +0.50)."
    )
    many = said(*({"quantization": f"nf4 {number}"} for number in range(14)))
    assert many.endswith("does not seem to depend on the learning rate: see the table.")


def made(cells: list[dict[str, object]], **model: object) -> findings.Findings:
    trials, epochs = synthetic.study_frames(cells, epochs=2, **model)  # type: ignore[arg-type]
    trials = trials.assign(machine="here")
    return findings.compute(Study(trials, epochs, {"study": "s", "simulated": False}, [], None))


@pytest.fixture(scope="module")
def full() -> findings.Findings:
    return made(synthetic.plan(), effects={"nf4": -0.01})


def test_every_axis_of_the_full_grid_has_its_sentence_and_rows(full: findings.Findings) -> None:
    (chapter,) = dependence.dependence(full)
    axes = ["model", "data set", "LoRA rank and alpha"]
    for axis, paragraph in zip(axes, chapter.paragraphs[:3], strict=True):
        assert f"the {axis}" in paragraph
        assert all(mode in paragraph for mode in ("int8", "nf4", "nf4-dq"))
    assert "4 tests of a mode" in chapter.paragraphs[3]
    tests, levels = chapter.tables
    assert [row[0] for row in tests.rows] == [axis for axis in axes for _ in range(3)]
    assert [row[1] for row in levels.rows] == [
        *TINY, "deit_small_patch16_224", "cifar10", "cifar100", "4 / 8", "8 / 16", "16 / 32"
    ]  # fmt: skip
    assert levels.columns == ("axis", "level", "int8, pp", "nf4, pp", "nf4-dq, pp")


def test_the_data_sets_differ_as_in_the_chapter_on_accuracy(full: findings.Findings) -> None:
    """One number a quantity: the mean difference within a data set is that of its level."""
    levels = full.axes.levels[full.axes.levels["axis"] == "data set"]
    ours = levels.set_index(["level", "quantization"])["difference"]
    theirs = full.by_dataset.set_index(["dataset", "quantization"])["mean_difference"]
    assert ours.to_dict() == pytest.approx(theirs.to_dict())


def test_many_modes_have_a_row_per_level_and_mode() -> None:
    modes = ("none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
    cells = synthetic.plan(models=TINY, lora=((8, 16),), modes=modes, seeds=(1, 2))
    (chapter,) = dependence.dependence(made(cells))
    assert chapter.tables[1].columns[:4] == ("axis", "level", "mode", "difference, pp")
    assert len(chapter.tables[1].rows) == 2 * 5
    assert "One matched set" in chapter.paragraphs[0]
    assert "of a mode; what" not in chapter.paragraphs[1]


def test_where_no_axis_varies_there_is_no_chapter() -> None:
    found = made(synthetic.plan(models=TINY, datasets=("cifar10",), lora=((8, 16),)))
    assert dependence.dependence(found) == []
    page = make_page(found)
    assert "axes" not in {section.key for section in page.sections}
    assert "axes" not in page.figures
    assert "unavailable" in summary.detailed_analysis(found)["axis_tests"]
    assert "unavailable" in summary.experiments_summary(found)["dependence_on_axes"]


def test_the_tables_are_in_the_json(full: findings.Findings) -> None:
    details = summary.detailed_analysis(full)
    assert len(details["axis_tests"]) == 9
    assert len(details["axis_levels"]) == 7 * 3
    assert summary.experiments_summary(full)["dependence_on_axes"] == details["axis_tests"]
