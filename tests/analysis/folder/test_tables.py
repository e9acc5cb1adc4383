"""The two tables: what a column can't hold, files that can't be used, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import load
from tests.analysis.studies import (
    change,
    edit_trials,
    name,
    named,
    row,
    same,
    truncate,
    without_trials,
)


def nested(path: Path) -> None:
    table = pq.read_table(path)
    index = table.column_names.index("test_accuracy")
    lists = pa.array([[1.0]] * table.num_rows)
    pq.write_table(table.set_column(index, "test_accuracy", lists), path)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (truncate, "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"PAR1 not parquet at all PAR1"), "truncated"),
        (lambda path: path.unlink(), "does not exist"),
        (edit_trials(lambda t: t.drop(columns="status")), "lacks 1 column"),
        (edit_trials(lambda t: t.iloc[1:]), "are planned"),
        (edit_trials(lambda t: t.assign(seed=99)), "seed differs"),
        (edit_trials(lambda t: t.assign(quantization="nf4")), "quantization differs"),
        (edit_trials(lambda t: t.assign(trial_id=t["trial_id"].iloc[0])), "two rows"),
        (edit_trials(lambda t: t.assign(epochs_completed=99)), "disagree"),
        (edit_trials(lambda t: t.assign(status="pending")), "never began"),
        (nested, "not numbers or text"),
    ],
)
def test_a_bad_trials_table_is_named_and_rebuilt(folder: Path, spoil: Any, word: str) -> None:
    whole = load.read_study(folder)
    spoil(folder / "trials.parquet")
    study = load.read_study(folder)
    assert named(study, "tables", word), study.problems
    same(study, whole)


def test_a_truncated_epochs_table_is_named_and_rebuilt(folder: Path) -> None:
    whole = load.read_study(folder)
    truncate(folder / "epochs.parquet")
    study = load.read_study(folder)
    assert named(study, "epochs.parquet", "truncated")
    same(study, whole)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_of_an_earlier_version_that_stand_alone_are_read(folder: Path, kind: str) -> None:
    """A published study is its tables; the next version's columns do not make it unreadable."""
    whole = load.read_study(folder)
    other = {"parquet": "csv", "csv": "parquet"}[kind]
    for path in [*without_trials(folder).glob(f"*.{other}")]:
        path.unlink()
    path = folder / f"trials.{kind}"
    if kind == "csv":
        pd.read_csv(path, dtype=str).drop(columns="initial_error").to_csv(path, index=False)
    else:
        edit_trials(lambda t: t.drop(columns="initial_error"))(path)
    study = load.read_study(folder)
    assert named(study, "trials table", "earlier version", "initial_error"), study.problems
    assert study.trials["initial_error"].isna().all()
    same(study, whole, but=("initial_error",))


@pytest.mark.parametrize("column", ["trial_id", "status"])
def test_a_table_without_what_every_version_has_is_no_table(folder: Path, column: str) -> None:
    edit_trials(lambda t: t.drop(columns=column))(without_trials(folder) / "trials.parquet")
    assert named(load.read_study(folder), "trials.parquet", "lacks 1 column(s)", column)


@pytest.mark.parametrize(
    ("part", "column", "value", "expected"),
    [
        ("test_metrics", "test_accuracy", "abc", None),
        ("test_metrics", "test_accuracy", 91.2, None),
        ("test_metrics", "test_accuracy", [0.9], None),
        ("model_metrics", "weights_bytes", -1, None),
        ("model_metrics", "weights_bytes", 10**40, None),
        ("model_metrics", "weights_bytes", 1.5, None),
        ("model_metrics", "weights_bytes", 2**53 - 1, 2**53 - 1),
        ("test_metrics", "test_loss", "0.25", 0.25),
    ],
)
def test_values_that_a_column_cannot_hold_are_missing_and_named(
    folder: Path, part: str, column: str, value: Any, expected: Any
) -> None:
    path = folder / name(0) / "results.json"
    change(path, lambda results: results["train"][part].update({column: value}))
    study = load.rebuild(folder)
    got = row(study, 0)[column]
    if expected is None:
        assert pd.isna(got)
        assert named(study, column, "missing")
    else:
        assert got == expected
        assert study.problems == []


def test_the_last_row_of_an_epoch_counts(folder: Path) -> None:
    def twice(value: dict[str, Any]) -> None:
        epochs = value["train"]["epochs"]
        epochs.append({**epochs[1], "val_accuracy": 0.5})
        epochs.insert(0, epochs.pop(2))
        epochs.append("no record")

    change(folder / name(0) / "results.json", twice)
    study = load.rebuild(folder)
    own = study.epochs[study.epochs["trial_id"] == name(0)]
    assert own["epoch"].tolist() == [1, 2, 3, 4]
    assert own["val_accuracy"].iloc[1] == 0.5
    assert named(study, "no records")


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    study = load.read_study(folder)

    def half(self: pd.DataFrame, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="disk full"):
        load.write_tables(study, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    assert not list(folder.glob(".*"))
