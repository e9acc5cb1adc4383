"""A small study folder, and what the tests do to it. No test module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import load
from tests import synthetic

CELLS = synthetic.plan(
    models=synthetic.MODELS[:1], datasets=("cifar10",), lora=((4, 8), (8, 16)), seeds=(1, 2)
)
FAILURES = {3: "oom", 5: "pending", 7: "interrupted", 8: "early_stopped"}


def name(position: int) -> str:
    return str(CELLS[position]["trial_id"])


def row(study: load.Study, position: int) -> pd.Series:
    return study.trials.set_index("trial_id").loc[name(position)]


def same(one: load.Study, other: load.Study, *, but: tuple[str, ...] = ()) -> None:
    kept = [column for column in one.trials if column not in but]
    pd.testing.assert_frame_equal(one.trials[kept], other.trials[kept])
    pd.testing.assert_frame_equal(one.epochs, other.epochs)


def change(path: Path, edit: Any) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def without_tables(folder: Path) -> Path:
    for path in [*folder.glob("*.parquet"), *folder.glob("*.csv")]:
        path.unlink()
    return folder


def without_trials(folder: Path) -> Path:
    for path in folder.glob("*/*.json"):
        path.unlink()
    return folder


def named(study: load.Study, *words: str) -> bool:
    return any(all(word in problem for word in words) for problem in study.problems)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_trials(edit: Any) -> Any:
    def spoil(path: Path) -> None:
        edit(pd.read_parquet(path)).to_parquet(path)

    return spoil


def only(table: pd.DataFrame, **where: str) -> pd.Series:
    """The one row in which these columns have these values."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]
