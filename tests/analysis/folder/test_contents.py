"""What lies in a study folder is read or named, and harmlessly."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import load
from analysis.load import StudyError
from tests.analysis.studies import (
    CELLS,
    change,
    name,
    named,
    row,
    same,
    truncate,
    without_tables,
    without_trials,
)
from tune_study.folder import schema


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
