import json

import pytest

from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.machine import provenance
from tune_study.study import manifest
from tune_study.trial.context import RunContext

CHECKSUMS = {"data": {"digits": {"sha256": "d"}}, "weights": {"m": {"sha256": "w"}}}


def context(tmp_path, **fields):
    return RunContext(study_dir=tmp_path / "study", **fields)


def open_study(trials, where, checksums=CHECKSUMS):
    manifest.open_study(trials, where, checksums, grid="g", command="c")
    return json.loads((where.study_dir / "study.json").read_text())


def test_study_json_holds_plan_and_provenance(tiny, tmp_path):
    trials = [tiny("none"), tiny("nf4")]
    manifest = open_study(trials, context(tmp_path))
    assert [cell["trial_id"] for cell in manifest["plan"]] == [t.trial_id for t in trials]
    assert manifest["simulated"] is False
    found = manifest["provenance"]
    assert {"torch", "bitsandbytes", "peft", "timm", "ray"} <= set(found["versions"])
    assert found["hardware"]["cores"] >= 1
    assert found["data"] == CHECKSUMS["data"]


def test_a_study_is_continued_extended_or_refused(tiny, tmp_path):
    where = context(tmp_path)
    one, two = tiny("none"), tiny("nf4")
    created = open_study([one], where)["created"]
    extended = open_study([one, two], where)
    assert [cell["trial_id"] for cell in extended["plan"]] == [one.trial_id, two.trial_id]
    assert extended["created"] == created
    assert len(open_study([one], where)["plan"]) == 2  # a part of it: the rest stays planned
    changed = tiny("none", training={"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"training\.learning_rate was 0\.001 and is 0\.5"):
        open_study([changed], where)
    for kind, name in (("data", "digits"), ("weights", "m")):
        with pytest.raises(UserError, match=f"the {kind} of {name}"):
            open_study([one], where, {**CHECKSUMS, kind: {name: {"sha256": "other"}}})


def test_continuing_with_something_else_is_said_and_recorded(tiny, tmp_path, monkeypatch):
    where, trials = context(tmp_path), [tiny("none")]
    reopen = {"grid": "g", "command": "c"}
    assert manifest.open_study(trials, where, CHECKSUMS, **reopen) == []
    assert manifest.open_study(trials, where, CHECKSUMS, **reopen) == []
    versions = {**provenance.versions(), "torch": "9.9"}
    monkeypatch.setattr(provenance, "versions", lambda: versions)
    (note,) = manifest.open_study(trials, where, CHECKSUMS, **reopen)
    assert "torch was" in note
    assert "and is 9.9" in note
    other = where.model_copy(update={"device": "mps"})
    (note,) = manifest.open_study(trials, other, CHECKSUMS, **reopen)
    assert "device was cpu and is mps" in note
    sessions = json.loads((where.study_dir / "study.json").read_text())["sessions"]
    assert [s["versions"]["torch"] == "9.9" for s in sessions] == [False, False, True, True]
    assert [s["device"] for s in sessions] == ["cpu", "cpu", "cpu", "mps"]


def test_a_study_json_that_is_not_whole_is_written_anew_for_the_same_data(tiny, tmp_path):
    where, trial = context(tmp_path), tiny("none")
    open_study([trial], where)
    path = where.study_dir / "study.json"
    results = {"train": {"model_metrics": {"data_sha256": "d"}}}
    (where.study_dir / trial.trial_id).mkdir()
    write_json(where.study_dir / trial.trial_id / "results.json", results)
    path.write_text(path.read_text()[:100])
    (note,) = manifest.open_study([trial], where, CHECKSUMS, grid="g", command="c")
    assert "not whole" in note
    assert manifest.planned_ids(where.study_dir) == {trial.trial_id}
    path.write_text("")
    changed = {**CHECKSUMS, "data": {"digits": {"sha256": "other"}}}
    with pytest.raises(UserError, match="its trials saw another digits"):
        open_study([trial], where, changed)


def test_a_folder_that_is_no_study_is_refused(tiny, tmp_path):
    where = context(tmp_path)
    where.study_dir.mkdir()
    (where.study_dir / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        open_study([tiny("none")], where)


def test_an_extension_keeps_the_checksums_of_what_came_before(tiny, tmp_path):
    where, one = context(tmp_path), tiny("none")
    open_study([one], where)
    other = {"data": {"cifar10": {"sha256": "c"}}, "weights": {"n": {"sha256": "v"}}}
    found = open_study([one, tiny("nf4")], where, other)["provenance"]
    assert found["data"] == {"digits": {"sha256": "d"}, "cifar10": {"sha256": "c"}}
    assert found["weights"] == {"m": {"sha256": "w"}, "n": {"sha256": "v"}}
    with pytest.raises(UserError, match="the data of digits"):
        open_study([one], where, {**other, "data": {"digits": {"sha256": "changed"}}})
