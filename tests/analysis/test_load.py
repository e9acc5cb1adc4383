"""A study folder comes back as the same two tables, whatever state it is in, and harmlessly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.load import StudyError
from tests import synthetic
from tests.analysis.studies import (
    CELLS,
    FAILURES,
    change,
    edit_trials,
    name,
    named,
    row,
    same,
    without_tables,
    without_trials,
)
from tune_study.folder import schema

# ---- the same study from its tables and from its JSON


def test_tables_and_json_agree_in_every_value_and_type(folder: Path) -> None:
    from_tables, rebuilt = load.read_study(folder), load.rebuild(folder)
    same(from_tables, rebuilt)
    assert from_tables.problems == rebuilt.problems == []
    columns = {column.name for column in schema.TRIALS}
    assert {str(from_tables.trials[c].dtype) for c in columns} == {
        "string",
        "Int64",
        "float64",
        "boolean",
    }
    assert dict(from_tables.epochs.dtypes) == schema.dtypes(schema.EPOCHS)
    assert list(from_tables.trials["trial_id"]) == [cell["trial_id"] for cell in CELLS]


def test_json_values_reach_the_right_cells(folder: Path) -> None:
    results = json.loads((folder / name(0) / "results.json").read_text())
    got = row(load.rebuild(folder), 0)
    assert got["test_accuracy"] == results["train"]["test_metrics"]["test_accuracy"]
    assert got["weights_bytes"] == results["train"]["model_metrics"]["weights_bytes"]
    assert got["peak_source"] == "profiler"
    assert got["machine"] == "Test CPU, 2 cores, 7.5 GiB"
    epochs = load.rebuild(folder).epochs
    losses = epochs.loc[epochs["trial_id"] == name(0), "train_loss"].tolist()
    assert losses == [epoch["train_loss"] for epoch in results["train"]["epochs"]]


def test_failures_and_trials_that_never_ran_stay_rows(folder: Path) -> None:
    study = load.rebuild(folder)
    assert len(study.trials) == len(CELLS)
    assert [row(study, position)["status"] for position in FAILURES] == list(FAILURES.values())
    assert pd.isna(row(study, 5)["epochs_completed"])
    assert pd.isna(row(study, 5)["machine"])
    assert np.isnan(row(study, 3)["test_accuracy"])


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_written_tables_read_back_identically(folder: Path, kind: str) -> None:
    study = load.rebuild(folder)
    study.trials.loc[3, "error"] = "NA"
    without_tables(without_trials(folder))
    load.write_tables(study, folder)
    if kind == "csv":
        for path in folder.glob("*.parquet"):
            path.unlink()
    again = load.read_study(folder)
    same(study, again)
    assert again.problems == [] if kind == "parquet" else named(again, ".csv")


def test_the_tables_are_what_is_read(folder: Path) -> None:
    trials = pd.read_parquet(folder / "trials.parquet")
    trials.loc[0, "test_accuracy"] = 0.123
    trials.to_parquet(folder / "trials.parquet")
    assert row(load.read_study(folder), 0)["test_accuracy"] == 0.123
    assert row(load.rebuild(folder), 0)["test_accuracy"] != 0.123


def test_machine_of_a_trial_is_where_it_ran(folder: Path) -> None:
    hardware = {"cpu": "Apple M2", "cores": 8, "memory_bytes": 2**34, "gpu": {"name": "M2 GPU"}}
    change(folder / name(1) / "results.json", lambda value: value["meta"].update(hardware=hardware))
    study = load.rebuild(folder)
    assert row(study, 1)["machine"] == "Apple M2, 8 cores, 16.0 GiB, gpu M2 GPU"
    load.write_tables(study, folder)
    assert row(load.read_study(folder), 1)["machine"].startswith("Apple M2")


# ---- tables that can't be trusted


def test_tables_older_than_a_result_are_not_used(folder: Path) -> None:
    path = folder / name(5) / "results.json"
    path.parent.mkdir()
    value = json.loads((folder / name(4) / "results.json").read_text())
    path.write_text(json.dumps(value | {"trial_id": name(5)}))
    later = time.time() + 10
    os.utime(path, (later, later))
    study = load.read_study(folder)
    assert named(study, "older than")
    assert row(study, 5)["status"] == "completed"


def test_tables_of_a_folder_without_trials_are_used(folder: Path) -> None:
    whole = load.read_study(folder)
    same(load.read_study(without_trials(folder)), whole)


# ---- trials that can't be read


def test_a_status_nobody_knows_becomes_an_error(folder: Path) -> None:
    change(folder / name(0) / "results.json", lambda value: value.update(status="great"))
    study = load.rebuild(folder)
    assert row(study, 0)["status"] == "error"
    assert named(study, "great")


def test_a_running_study_without_tables_counts_its_epochs(folder: Path) -> None:
    def running(value: dict[str, Any]) -> None:
        value["status"] = "interrupted"
        value["train"]["training_results"].pop("epochs_completed")
        value["train"]["epochs"] = value["train"]["epochs"][:2]

    change(without_tables(folder) / name(0) / "results.json", running)
    assert row(load.read_study(folder), 0)["epochs_completed"] == 2


# ---- simulated and real


def test_a_simulated_result_in_a_real_study_is_not_used(folder: Path) -> None:
    change(folder / name(0) / "results.json", lambda value: value.update(simulated=True))
    study = load.rebuild(folder)
    assert row(study, 0)["status"] == "interrupted"
    assert np.isnan(row(study, 0)["test_accuracy"])
    assert named(study, name(0), "simulated")


def test_tables_that_mix_are_refused(folder: Path) -> None:
    edit_trials(lambda t: t.assign(simulated=[True, *[False] * (len(t) - 1)]))(
        folder / "trials.parquet"
    )
    with pytest.raises(StudyError, match="mixes simulated and real"):
        load.read_study(folder)


# ---- start-up


def test_opening_a_full_study_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = synthetic.write_study(tmp_path / "full")
    program = (
        "import sys; from analysis import load; from analysis.statistics import comparison\n"
        f"study = load.read_study({str(folder)!r}); assert len(study.trials) == 144\n"
        "print(comparison.compare_modes(study.trials).to_string())\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'ray', 'matplotlib', 'statsmodels'}, loaded\n"
    )
    root = Path(load.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nf4-dq" in done.stdout
