"""Whatever lies in a study folder, it is read, or refused in one sentence of ours."""

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import compare, load, power, report
from tests import synthetic
from tests.fuzz.hostile import TEXT, TRIAL, damaged, files_like, fuzz, in_place_of, outcome
from tune_study.config import parse_trial
from tune_study.errors import UserError
from tune_study.folder import schema
from tune_study.machine import provenance
from tune_study.study import manifest, status
from tune_study.trial import checkpoint
from tune_study.trial.context import RunContext, Simulation

# ---- a study folder, as the run reads it


PLANNED = [parse_trial({**TRIAL, "seed": seed}) for seed in (1, 2)]
SUMS = {"data": {"folder:photos": {"sha256": "a"}}, "weights": {"deit": {"sha256": None}}}


def opened(folder, simulation=None):
    context = RunContext(study_dir=folder, device="cpu", num_threads=1, simulation=simulation)
    manifest.open_study(PLANNED, context, SUMS, grid="g", command="c")
    return json.loads((folder / "study.json").read_text())


@pytest.fixture(scope="module")
def study_json(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("manifest") / "study")


@pytest.fixture
def same_machine(monkeypatch, study_json):
    """Looking at the machine takes longer than all the rest."""
    for name in ("versions", "commit", "hardware"):
        monkeypatch.setattr(provenance, name, lambda name=name: study_json["provenance"][name])


@fuzz(80)
@given(data=st.data(), simulated=st.booleans())
def test_a_study_json_is_continued_or_refused(tmp_path, study_json, same_machine, data, simulated):
    folder = tmp_path / "study"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "study.json").write_bytes(data.draw(files_like(study_json)))
    outcome(lambda: manifest.planned_ids(folder), UserError)
    simulation = Simulation() if simulated else None
    found = outcome(lambda: opened(folder, simulation), UserError)
    if found is not None:
        assert {t.trial_id for t in PLANNED} <= manifest.planned_ids(folder)
        assert load.rebuild(folder).trials["trial_id"].nunique() >= len(PLANNED)


@fuzz(50)
@given(data=st.data())
def test_a_result_has_a_status_that_we_know(tmp_path, data):
    result = {"trial_id": PLANNED[0].trial_id, "status": "completed", "train": {}}
    file = tmp_path / PLANNED[0].trial_id / "results.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data.draw(files_like(result)))
    found = status.statuses(PLANNED, tmp_path)
    assert set(found.values()) <= set(schema.STATUSES)
    waiting = status.todo(PLANNED, tmp_path)
    assert (PLANNED[0] in waiting) == (found[PLANNED[0].trial_id] not in schema.FINISHED_STATUSES)


@pytest.mark.parametrize("kind", range(5))
def test_what_is_no_file_is_not_waited_for(tmp_path, study_json, kind):
    name = PLANNED[0].trial_id
    (tmp_path / name).mkdir()
    list(in_place_of(tmp_path / name / "results.json"))[kind]()
    (tmp_path / "study.json").write_text(json.dumps(study_json))
    assert status.statuses(PLANNED, tmp_path)[name] == "pending"
    assert load.read_study(tmp_path).trials["status"][0] in ("pending", "interrupted")
    (tmp_path / "study.json").unlink()
    list(in_place_of(tmp_path / "study.json"))[kind]()
    outcome(lambda: opened(tmp_path), UserError)


# ---- a checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(study folder, trial id, checkpoint): one that is whole."""
    root = tmp_path_factory.mktemp("checkpoint")
    state = {name: {} for name in (*checkpoint.BINARY, *checkpoint.PLAIN)}
    state |= {"history": [{"epoch": 1}]}
    state |= {name: {"x": torch.zeros(2)} for name in checkpoint.TENSORS}
    folder = checkpoint.save(root / "trial", state, {})
    return root, "trial", folder


@fuzz(40)
@given(data=st.data())
def test_a_checkpoint_is_whole_and_loads_or_is_passed_over(tmp_path, saved, data):
    root = tmp_path / "study"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(saved[0], root)
    folder = root / saved[2].relative_to(saved[0])
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    if file.name == "state.json":
        file.write_bytes(data.draw(files_like(json.loads(file.read_text()))))
    else:
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    found, broken = checkpoint.newest(root / saved[1])
    assert (found, broken) in ((folder, []), (None, [folder]))
    if found is not None:
        state, _ = checkpoint.load(found)
        assert set(state) == {*checkpoint.TENSORS, *checkpoint.BINARY, *checkpoint.PLAIN}


# ---- a study folder, as the analysis reads it


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    cells = synthetic.plan(synthetic.MODELS[:1], ["cifar10"], [(4, 8), (8, 16)], ["none", "nf4"])
    failures = {1: "error", 2: "pending"}
    folder = tmp_path_factory.mktemp("template") / "study"
    return synthetic.write_study(folder, cells, epochs=3, failures=failures)


@st.composite
def spoiled(draw, template, folder):
    """A copy of the study in which one to three files are damaged, replaced or gone."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    top = [path for path in files if path.parent == folder]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(top) | st.sampled_from(files))
        if not path.is_file():
            continue
        if draw(st.integers(0, 9)) == 0:
            path.unlink()
            draw(st.sampled_from([*in_place_of(path), lambda: None]))()
        elif path.suffix == ".json":
            original = template / path.relative_to(folder)
            path.write_bytes(draw(files_like(json.loads(original.read_text()))))
        else:
            path.write_bytes(draw(damaged(path.read_bytes())))
    return folder


def whole(found):
    assert list(found.trials.columns)[: len(schema.TRIALS)] == [c.name for c in schema.TRIALS]
    assert set(found.trials["status"]) <= set(schema.STATUSES)
    assert set(found.epochs["trial_id"]) <= set(found.trials["trial_id"])


@fuzz(25)
@given(data=st.data())
def test_a_spoiled_study_is_read_or_refused(tmp_path, template, data):
    folder = data.draw(spoiled(template, tmp_path / "study"))
    for read in (load.read_study, load.rebuild):
        found = outcome(lambda read=read: read(folder), load.StudyError)
        if found is not None:
            whole(found)


@pytest.mark.slow
@fuzz(4)
@given(data=st.data())
def test_a_spoiled_study_has_a_report_or_is_refused(tmp_path, template, data):
    folder = data.draw(spoiled(template, tmp_path / "study"))
    if outcome(lambda: report.write_report(folder), load.StudyError) is not None:
        assert compare.main([str(folder), str(folder)]) in (0, 2)


@fuzz(30)
@given(TEXT.filter(lambda text: "\0" not in text))
def test_the_name_of_a_study_is_found_or_refused(tmp_path, name):
    # So deep that "../.." is a folder of this test, and none that others have filled.
    here = tmp_path / "a" / "b" / "c"
    here.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(here):
        assert_refused_by_all(name)


def assert_refused_by_all(name):
    assert power.main(["--study", name]) == 2
    assert compare.main(["--", name, name]) == 2
    assert report.main(["--", name]) == 2
