"""A study folder comes back as the same two tables, whatever state it is in, and harmlessly."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import load, tables
from analysis.load import StudyError
from tests import synthetic
from tune_study import schema

CELLS = synthetic.plan(
    models=synthetic.MODELS[:1], datasets=("cifar10",), lora=((4, 8), (8, 16)), seeds=(1, 2)
)
FAILURES = {3: "oom", 5: "pending", 7: "interrupted", 8: "early_stopped"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "study"
    return synthetic.write_study(path, CELLS, failures=FAILURES, epochs=4)


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "study")


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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_trials(edit: Any) -> Any:
    def spoil(path: Path) -> None:
        edit(pd.read_parquet(path)).to_parquet(path)

    return spoil


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


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'{"trial_id": "x", "train": {"ep', "truncated"),
        (b"", "truncated"),
        (b"\xff\xfe\x00", "codec"),
        (b"[1, 2]", "no trial's result"),
        (b"[" * 100_000, "nested"),
        (b'{"trial_id": "another", "train": {}}', "another"),
    ],
)
def test_a_broken_result_is_named_and_the_others_stand(
    folder: Path, content: bytes, word: str
) -> None:
    whole = load.read_study(folder)
    (without_tables(folder) / name(0) / "results.json").write_bytes(content)
    study = load.read_study(folder)
    assert named(study, name(0), "results.json", word), study.problems
    assert row(study, 0)["status"] == "interrupted"
    assert "results.json" in row(study, 0)["error"]
    pd.testing.assert_frame_equal(study.trials.iloc[1:], whole.trials.iloc[1:])


def test_a_trial_with_an_error_file_alone_is_an_error(folder: Path) -> None:
    (folder / name(3) / "results.json").unlink()
    study = load.rebuild(folder)
    assert row(study, 3)["status"] == "error"
    assert row(study, 3)["error"] == "PlantedError: planted oom"
    assert named(study, name(3), "error.json")


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


def test_a_status_nobody_knows_becomes_an_error(folder: Path) -> None:
    change(folder / name(0) / "results.json", lambda value: value.update(status="great"))
    study = load.rebuild(folder)
    assert row(study, 0)["status"] == "error"
    assert named(study, "great")


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


def test_a_running_study_without_tables_counts_its_epochs(folder: Path) -> None:
    def running(value: dict[str, Any]) -> None:
        value["status"] = "interrupted"
        value["train"]["training_results"].pop("epochs_completed")
        value["train"]["epochs"] = value["train"]["epochs"][:2]

    change(without_tables(folder) / name(0) / "results.json", running)
    assert row(load.read_study(folder), 0)["epochs_completed"] == 2


# ---- folders from strangers


class Bomb:
    """Unpickling this makes the folder ``marker``."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def test_a_pickle_is_named_and_never_loaded(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "exploded"
    places = [
        folder / "tuner.pkl",
        folder / name(0) / "result.pkl",
        folder / "run-1" / "tuner.pkl",
        folder / "trials.pickle",
    ]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(pickle.dumps(Bomb(str(marker))))
    for name_of_table in ("trials.parquet", "epochs.parquet"):
        (folder / name_of_table).write_bytes(pickle.dumps(Bomb(str(marker))))
    study = load.read_study(folder)
    assert not marker.exists()
    assert named(study, "tuner.pkl", "trials.pickle", f"{name(0)}/result.pkl", "not read")
    assert not named(study, "run-1")
    assert named(study, "trials.parquet")


def test_trial_ids_cannot_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (folder / name(0)).rename(outside)
    (folder / name(1)).rename(folder / "<b>")
    change(folder / "<b>" / "results.json", lambda value: value.update(trial_id="<b>"))
    evil = ["../outside", str(outside), "<script>alert(1)</script>", "..", "a/../../outside", "<b>"]

    def plant(value: dict[str, Any]) -> None:
        for position, trial_id in enumerate(evil):
            value["plan"][position]["trial_id"] = trial_id

    change(without_tables(folder) / "study.json", plant)
    change(outside / "results.json", lambda value: value.update(trial_id="../outside"))
    study = load.read_study(folder)
    assert study.trials["trial_id"].tolist()[:6] == evil
    assert (study.trials["status"][:6] == "pending").all()
    assert study.trials["test_accuracy"][:6].isna().all()
    for trial_id in evil:
        assert named(study, repr(trial_id), "no plain folder name")


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / name(0)).rename(tmp_path / "elsewhere")
    (folder / name(0)).symlink_to(tmp_path / "elsewhere")
    (folder / name(1) / "results.json").rename(tmp_path / "results.json")
    (folder / name(1) / "results.json").symlink_to(tmp_path / "results.json")
    (folder / "trials.parquet").rename(tmp_path / "trials.parquet")
    (folder / "trials.parquet").symlink_to(tmp_path / "trials.parquet")
    study = load.read_study(folder)
    assert row(study, 0)["status"] == "pending"
    assert row(study, 1)["status"] == "interrupted"
    assert named(study, name(1), "leaves the study")
    assert named(study, repr(name(0)), "not read")
    assert named(study, "trials.parquet", "no regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang_the_reader(folder: Path) -> None:
    path = without_tables(folder) / name(0) / "results.json"
    path.unlink()
    os.mkfifo(path)
    assert named(load.read_study(folder), name(0), "no regular file")


def test_what_does_not_belong_is_named(folder: Path) -> None:
    (folder / "stray").mkdir()
    (folder / "notes.docx").write_text("")
    study = load.read_study(folder)
    assert named(study, "stray", "no plan")
    assert named(study, "notes.docx", "foreign")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.integers(0, 3000), junk=st.binary(max_size=20), cut=st.integers(0, 400))
def test_no_corruption_of_a_result_breaks_the_reader(
    folder: Path, start: int, junk: bytes, cut: int
) -> None:
    path = folder / name(1) / "results.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + junk + whole[start + cut :])
    try:
        study = load.rebuild(folder)
    finally:
        path.write_bytes(whole)
    assert study.trials["trial_id"].tolist() == [cell["trial_id"] for cell in CELLS]
    assert study.trials["status"].isin(schema.STATUSES).all()
    assert study.trials["test_accuracy"].dropna().between(0, 1).all()


# ---- study.json


@pytest.mark.parametrize("spoil", [truncate, Path.unlink, lambda p: p.write_text('{"plan": 3}')])
def test_a_lost_plan_is_recovered_from_the_trials(folder: Path, spoil: Any) -> None:
    spoil(folder / "study.json")
    whole = load.rebuild(folder)
    assert named(whole, "study.json", "never began are missing")
    assert set(whole.trials["trial_id"]) == {c["trial_id"] for c in CELLS} - {name(5)}
    assert row(whole, 1)["lora_r"] == CELLS[1]["lora"]["r"]
    assert not whole.manifest["simulated"]


def test_tables_alone_are_a_study_with_a_problem(folder: Path) -> None:
    whole = load.read_study(folder)
    (without_trials(folder) / "study.json").unlink()
    study = load.read_study(folder)
    same(study, whole, but=("machine",))
    assert named(study, "study.json", "the plan is lost")


def test_what_is_no_study_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, word in ((tmp_path, "is no study"), (tmp_path / "no", "does not exist"),
                       (tmp_path / "file", "is a file")):  # fmt: skip
        with pytest.raises(StudyError, match=word) as caught:
            load.read_study(path)
        assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(folder: Path) -> None:
    change(folder / "study.json", lambda value: value.update(format=2))
    with pytest.raises(StudyError, match="format 2"):
        load.read_study(folder)


def test_odd_plan_entries_are_named(folder: Path) -> None:
    def plant(value: dict[str, Any]) -> None:
        value["plan"] += [7, {"model": "x"}, value["plan"][0], {"trial_id": "odd", "lora": []}]

    change(folder / "study.json", plant)
    study = load.read_study(folder)
    assert study.trials["trial_id"].tolist() == [*[c["trial_id"] for c in CELLS], "odd"]
    assert named(study, "entry 16", "no trial_id")
    assert named(study, name(0), "planned twice")


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


def test_studies_of_both_kinds_do_not_merge(folder: Path, tmp_path: Path) -> None:
    other = synthetic.write_study(tmp_path / "other", CELLS, simulated=True, epochs=2)
    assert load.read_study(other).trials["simulated"].all()
    with pytest.raises(StudyError, match="can't be merged"):
        load.read_studies([folder, other])


# ---- several studies


def test_studies_merge_with_their_names_and_machines(folder: Path, tmp_path: Path) -> None:
    other = synthetic.write_study(tmp_path / "b" / "study", CELLS, epochs=4, rng_seed=1)
    hardware = {"cpu": "Other CPU", "cores": 4}
    for path in other.glob("*/results.json"):
        change(path, lambda value: value["meta"].update(hardware=hardware))
    (folder / "stray.txt").write_text("")
    merged = load.read_studies([folder, other])
    assert merged.trials["study"].unique().tolist() == ["study", "study (2)"]
    assert len(merged.trials) == 2 * len(CELLS)
    by_study = merged.trials.groupby("study")["machine"].unique()
    assert by_study["study (2)"].tolist() == ["Other CPU, 4 cores"]
    assert "Test CPU, 2 cores, 7.5 GiB" in by_study["study"].tolist()
    assert merged.epochs.groupby("study").size()["study (2)"] == 4 * len(CELLS)
    assert merged.problems[0].startswith("study: ")
    assert [m["study"] for m in merged.manifest["studies"]] == ["study", "study"]


def test_merging_refuses_nothing_and_the_same_twice(folder: Path) -> None:
    with pytest.raises(StudyError, match="no study"):
        load.read_studies([])
    with pytest.raises(StudyError, match="twice"):
        load.read_studies([folder, folder / ".." / "study"])


# ---- whole or not at all


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


def test_writing_replaces_by_rename(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        tables.write_whole(path, lambda temporary: temporary.write_text("new") and None)
        assert reader.read() == "old"
    assert path.read_text() == "new"


# ---- Tune's results in memory


def fake_trials(study: load.Study, how: str) -> list[SimpleNamespace]:
    """What Tune would hold: a report per epoch, the last with the trial's columns or results."""
    trials = []
    for cell, record in zip(CELLS, study.trials.to_dict("records"), strict=True):
        own = study.epochs[study.epochs["trial_id"] == cell["trial_id"]].drop(columns="trial_id")
        config = {
            "trial": {k: v for k, v in cell.items() if k != "trial_id"},
            "trial_id": cell["trial_id"],
            "simulated": False,
        }
        reports = [
            {k: v for k, v in epoch.items() if pd.notna(v)} for epoch in own.to_dict("records")
        ]
        if reports and how == "columns":
            reports[-1] |= {
                k: v for k, v in record.items()
                if pd.notna(v) and k not in reports[-1] and k not in ("trial_id", "machine")
            }  # fmt: skip
        if reports and how == "results":
            path = study.path / cell["trial_id"] / "results.json"
            reports[-1] |= {"results": json.loads(path.read_text())}
        history = pd.json_normalize(reports, sep="/") if reports else pd.DataFrame()
        trials.append(
            SimpleNamespace(
                trial_id=f"tune_{len(trials)}",
                config=config,
                last_result={**reports[-1], "config": config} if reports else {},
                history=history.assign(trial_id="tune_0", training_iteration=1),
                get_error=lambda: None,
            )
        )
    return trials


class FakeResultGrid:
    def __init__(self, trials: list[SimpleNamespace]) -> None:
        self._experiment_analysis = SimpleNamespace(trials=trials)
        self.errors: list[Exception] = []
        self._results = [
            SimpleNamespace(
                metrics=trial.last_result,
                metrics_dataframe=trial.history,
                config=trial.last_result.get("config"),
                error=None,
                path="/somewhere/else",
            )
            for trial in trials
        ]

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, position: int) -> SimpleNamespace:
        return self._results[position]


class FakeAnalysis:
    def __init__(self, trials: list[SimpleNamespace]) -> None:
        self.trials = trials
        self.trial_dataframes = {trial.trial_id: trial.history for trial in trials}


@pytest.mark.parametrize("kind", [FakeResultGrid, FakeAnalysis])
@pytest.mark.parametrize("how", ["columns", "results"])
def test_a_grid_in_memory_is_the_same_study(folder: Path, kind: Any, how: str) -> None:
    study = load.read_study(folder)
    got = load.from_result_grid(kind(fake_trials(study, how)))
    shared = {c.name for c in schema.TRIALS} & {c.name for c in schema.EPOCHS} - {"trial_id"}
    # A report means an epoch by the names that both tables share.
    but = ("machine", *shared) if how == "columns" else ()
    same(got, study, but=but)
    assert got.problems == []
    if how == "columns":
        best = got.epochs.groupby("trial_id")["val_accuracy"].max()
        assert row(got, 0)["val_accuracy"] <= best[name(0)]
        assert row(got, 0)["images_per_s"] == row(study, 0)["images_per_s"]


def test_a_retried_epoch_in_a_grid_counts_once(folder: Path) -> None:
    study = load.read_study(folder)
    trials = fake_trials(study, "columns")
    repeated = trials[0].history.iloc[[1]].assign(val_accuracy=0.5)
    trials[0].history = pd.concat(
        [trials[0].history.iloc[:2], repeated, trials[0].history.iloc[2:]]
    )
    got = load.from_result_grid(FakeAnalysis(trials))
    own = got.epochs[got.epochs["trial_id"] == name(0)]
    assert own["epoch"].tolist() == [1, 2, 3, 4]
    assert own["val_accuracy"].iloc[1] == 0.5


def test_tune_cannot_say_that_a_trial_is_complete(folder: Path) -> None:
    trials = fake_trials(load.read_study(folder), "none")
    trials[1].get_error = lambda: ValueError("Traceback\n  line\nRuntimeError: out of luck")
    got = load.from_result_grid(FakeAnalysis(trials))
    assert row(got, 0)["status"] == "interrupted"
    assert row(got, 1)["status"] == "error"
    assert row(got, 1)["error"] == "RuntimeError: out of luck"
    assert row(got, 5)["status"] == "pending"
    assert named(got, "reported no status")


def test_other_objects_and_other_trainables_are_refused() -> None:
    with pytest.raises(StudyError, match="list holds no Tune results"):
        load.from_result_grid([])
    foreign = SimpleNamespace(trial_id="t", config={"lr": 1}, last_result={})
    with pytest.raises(StudyError, match="not of tune_study"):
        load.from_result_grid(
            SimpleNamespace(trials=[foreign], trial_dataframes={"t": pd.DataFrame()})
        )


# ---- start-up


def test_opening_a_full_study_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = synthetic.write_study(tmp_path / "full")
    program = (
        "import sys; from analysis import load, statistics\n"
        f"study = load.read_study({str(folder)!r}); assert len(study.trials) == 144\n"
        "print(statistics.compare_modes(study.trials).to_string())\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'ray', 'matplotlib', 'statsmodels'}, loaded\n"
    )
    root = Path(load.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nf4-dq" in done.stdout
