"""Whether QLoRA's finding carries over, in a clause per mode."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.chapters.literature import carried_over, literature
from analysis.findings.findings import compute
from analysis.literature.qlora import qlora_ratios
from analysis.load import read_study
from tests import synthetic


def clauses(quantized: float = 1.0, *, all_trials: float = 1.0) -> list[str]:
    """Of a study in which trials score so many times what they did."""
    trials, _ = synthetic.study_frames()
    trials.loc[trials["quantization"] != "none", "test_accuracy"] *= quantized
    trials["test_accuracy"] *= all_trials
    return carried_over(qlora_ratios(trials))


def test_a_mode_is_confirmed_open_or_refuted() -> None:
    int8, nf4, nf4_dq = clauses()
    assert int8 == (
        "int8, 0.999 (0.998 to 1.001), is open beside GLUE (1.000) "
        "and confirmed beside Super-NaturalInstructions (0.964 to 1.020)"
    )
    assert nf4.startswith("nf4 is not comparable (QLoRA prints no figure for NF4")
    assert nf4_dq.endswith(
        "is confirmed beside Super-NaturalInstructions (0.998 to 1.013) and MMLU (0.976 to 1.022)"
    )


def test_refuted_says_in_which_direction() -> None:
    assert "is refuted (worse here) beside Super-NaturalInstructions" in clauses(0.9)[2]
    assert "is refuted (better here) beside Super-NaturalInstructions" in clauses(1.1)[2]


def test_a_difference_that_their_cells_cannot_resolve_refutes_nothing() -> None:
    slightly_worse = clauses(0.99)[2]
    assert slightly_worse.startswith("nf4-dq, 0.990 (0.988 to 0.991), is open beside Super")
    assert "refuted" not in slightly_worse


def test_what_is_not_comparable_says_why() -> None:
    assert all("is not comparable (" in clause for clause in clauses(all_trials=0.001))
    assert "too near to chance" in clauses(all_trials=0.001)[2]


def test_treatments_of_some_layers_are_one_clause() -> None:
    """A study of one block at a time has a dozen of them."""
    trials, _ = synthetic.study_frames(synthetic.plan(modes=("none", "nf4", "nf4-dq")))
    apart = trials[trials["quantization"] == "nf4"]
    copies = [
        apart.assign(quantization=f"nf4 without blocks {i}", trial_id=apart["trial_id"] + str(i))
        for i in range(2)
    ]
    one, two = (pd.concat([trials, *copies[:n]], ignore_index=True) for n in (1, 2))
    (*_, last) = carried_over(qlora_ratios(one))
    assert last.startswith("1 treatment with settings for some layers is not comparable (")
    plain, dq, last = carried_over(qlora_ratios(two))
    assert plain.startswith("nf4 is not")
    assert dq.startswith("nf4-dq, ")
    assert last.startswith("2 treatments with settings for some layers are not comparable (")


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (["none"], None),
        (
            ["none", "nf4"],
            "QLoRA prints no figure for NF4 without double quantization in any table",
        ),
        (["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"], "; fp4-dq is not comparable ("),
    ],
)
def test_the_chapter_has_what_fits_and_nothing_of_no_mode(
    tmp_path: Path, modes: list[str], said: str | None
) -> None:
    cells = synthetic.plan(models=synthetic.MODELS[:1], modes=modes)
    study = read_study(synthetic.write_study(tmp_path / "s", cells))
    (*_, last) = literature(compute(study)).paragraphs
    assert ("carries over" in last) == (said is not None)
    assert (said or "ratio stand beside it.") in last
