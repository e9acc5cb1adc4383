"""The literature file: what it says, and what the loader refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.literature import claims

RANGE = "range of percentage points"


@pytest.fixture(scope="module")
def loaded() -> claims.Literature:
    return claims.load()


def _ratio(loaded: claims.Literature, mode: str, group: str) -> Any:
    table = claims.reference_ratios(loaded)
    return table[(table["quantization"] == mode) & (table["group"] == group)].iloc[0]


@pytest.mark.parametrize(
    ("mode", "group", "n", "mean", "low", "high"),
    [
        # Computed by hand when the figures were checked against the paper.
        ("int8", "GLUE", 1, 1.0000, 1.0000, 1.0000),
        ("int8", "Super-NaturalInstructions", 5, 0.9977, 0.9639, 1.0199),
        ("fp4", "GLUE", 1, 0.9977, 0.9977, 0.9977),
        ("fp4", "MMLU", 8, 0.983, 0.9649, 1.0128),
        ("nf4-dq", "Super-NaturalInstructions", 5, 1.0028, 0.9975, 1.0127),
        ("nf4-dq", "MMLU", 8, 0.9992, 0.9759, 1.0224),
    ],
)
def test_ratios_follow_from_the_tables(
    loaded: claims.Literature, mode: str, group: str, n: int, mean: float, low: float,
    high: float,
) -> None:  # fmt: skip
    row = _ratio(loaded, mode, group)
    assert row["n"] == n
    assert row["mean"] == pytest.approx(mean, abs=1e-4)
    assert row["low"] == pytest.approx(low, abs=1e-4)
    assert row["high"] == pytest.approx(high, abs=1e-4)


def test_spread_of_qloras_own_cells(loaded: claims.Literature) -> None:
    sds = [_ratio(loaded, *key)["sd"] for key in (("int8", "Super-NaturalInstructions"),
           ("fp4", "MMLU"), ("nf4-dq", "MMLU"))]  # fmt: skip
    assert all(0.016 <= sd <= 0.021 for sd in sds)


def test_the_dash_in_the_paper_stays_empty(loaded: claims.Literature) -> None:
    cell = [c for c in loaded.claims if c.table.id == "qlora-t3-glue" and "NF4" in c.row.method]
    assert [c.value for c in cell] == [None]
    row = _ratio(loaded, "nf4-dq", "GLUE")
    assert row["n"] == 0
    assert pd.isna(row["mean"])
    assert "invented" in row["note"]


def test_no_score_for_nf4_without_double_quantization(loaded: claims.Literature) -> None:
    scores = [
        c
        for c in loaded.claims
        if (c.table.source, c.row.quantization) == ("dettmers2023qlora", "nf4")
        and c.table.unit != "bits"
    ]
    assert scores == []
    assert any(entry.quantization == "nf4" for entry in loaded.empty)


def test_recalled_figures_are_left_out(loaded: claims.Literature) -> None:
    assert {c.table.grade for c in loaded.claims} == {"checked", "low"}
    tables = yaml.safe_load(claims.DEFAULT_PATH.read_text(encoding="utf-8"))["tables"]
    recalled = [row for table in tables if table["grade"] == "recalled" for row in table["rows"]]
    values = {value for row in recalled for value in row["values"]}
    assert values == {85.8, 93.82, 88.70, 93.99}


def test_every_claim_has_source_scope_and_baseline(loaded: claims.Literature) -> None:
    for claim in loaded.claims:
        assert claim.table.source in loaded.sources
        assert claim.table.task
        assert claim.model
        assert claim.table.metric
        if claim.row.baseline:
            assert claim.baseline_value is not None


def _document() -> dict[str, Any]:
    return {
        "sources": {"a2020": {"authors": "A", "title": "T", "year": 2020, "arxiv": None}},
        "tables": [
            {
                "id": "t",
                "domain": "language",
                "group": "G",
                "source": "a2020",
                "table": "Table 1",
                "grade": "checked",
                "task": "GLUE",
                "metric": "accuracy",
                "unit": "percent",
                "higher_is_better": True,
                "models": ["m"],
                "rows": [
                    {"method": "base", "quantization": "none", "dtype": "bf16", "values": [80.0]},
                    {"method": "q", "quantization": "int8", "dtype": "int8", "baseline": "base",
                     "values": [76.0]},
                ],
            }
        ],
    }  # fmt: skip


def _load(document: Any, tmp_path: Path) -> claims.Literature:
    path = tmp_path / "literature.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return claims.load(path)


def test_a_ratio_by_hand(tmp_path: Path) -> None:
    loaded = _load(_document(), tmp_path)
    row = claims.reference_ratios(loaded, source="a2020").iloc[0]
    assert row["mean"] == pytest.approx(76 / 80)


def _set(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document["tables"][0] |= changes
    return document


def _set_row(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document["tables"][0]["rows"][1] |= changes
    return document


def _ranges(values: list[Any], baseline: str | None = None) -> dict[str, Any]:
    document = _set_row(_set(_document(), unit=RANGE), values=values, baseline=baseline)
    document["tables"][0]["rows"][0]["values"] = [[1.0, 2.0]]
    return document


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (_set(_document(), source="b1999"), "b1999"),
        (_set(_document(), grade="guessed"), "guessed"),
        (_set(_document(), unit="bananas"), "bananas"),
        (_set(_document(), task=None), "task"),
        (_set(_document(), colour="red"), "colour is an unknown key"),
        (_set_row(_document(), values=[76.0, 77.0]), "2 values"),
        (_set_row(_document(), values=["76"]), "valid number, not '76'"),
        (_set_row(_document(), values=[True]), "valid number, not True"),
        (_set_row(_document(), values=[176.0]), "over 100"),
        (_set_row(_document(), values=[float("nan")]), "finite number, not nan"),
        (_set_row(_document(), values=[-1.0]), "greater than or equal to 0, not -1.0"),
        (_set_row(_document(), values=[[1.0, 2.0]]), "unit"),
        (_set(_document(), unit=RANGE), "80.0 does not fit its unit"),
        (_ranges([[1.0, 2.0]], "base"), "can't be divided"),
        (_ranges([[2.0, 1.0]]), "is no range"),
        (_set_row(_document(), baseline="nothing"), "nothing"),
        (_set_row(_document(), method="base"), "twice"),
        (_document() | {"tables": _document()["tables"] + _document()["tables"]}, "twice"),
        (
            _document()
            | {"empty": [{"source": "a2020", "quantization": "int8", "why": "none printed"}]},
            "print no int8",
        ),
        ({"sources": {}}, "tables is missing"),
        ([], "tables"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(
    document: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(claims.LiteratureError, match=words):
        _load(document, tmp_path)


def test_yaml_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "literature.yaml"
    path.write_text("a: [1", encoding="utf-8")
    with pytest.raises(claims.LiteratureError, match="not valid YAML"):
        claims.load(path)
