"""A study's place behind a URI, on a local disk: what is pulled, pushed, masked and refused."""

import json
import shutil

import pytest

from tune_study.errors import UserError
from tune_study.folder import remote
from tune_study.folder.remote import RemoteError, masked, open_remote
from tune_study.folder.store import (
    StorageLost,
    _part_of,
    held,
    kept,
    open_store,
    place_of,
    plainly,
    push_all,
    push_end,
)

TRIAL = "m-digits-r4-nf4-s1-00000000"


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def place(tmp_path):
    """(the URI of a study's folder in a store, what lies there)."""
    folder = tmp_path / "store" / "my study"
    return remote.join((tmp_path / "store").as_uri(), "my%20study"), folder


@pytest.fixture
def study(tmp_path, place):
    """A store of a local folder with a manifest, a finished and a running trial."""
    folder = tmp_path / "here"
    put(folder, "study.json", {"created": "then", "plan": []})
    put(folder, f"{TRIAL}/results.json", {"status": "completed"})
    put(folder, "running/results.json", {"status": "interrupted"})
    put(folder, "running/checkpoints/epoch-00001/training.pt", "tensors")
    put(folder, "running/checkpoints/epoch-00001/state.json", {})
    put(folder, "run-1/running/result.json", "Ray's own")
    put(folder, "running/.lock", "")
    store = open_store(place[0], folder)
    store.push("", TRIAL, "running")
    return store


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_what_is_ours_is_pushed_and_comes_back_elsewhere(study, place, tmp_path):
    expected = {
        "study.json",
        f"{TRIAL}/results.json",
        "running/results.json",
        "running/checkpoints/epoch-00001/training.pt",
        "running/checkpoints/epoch-00001/state.json",
    }
    assert names(place[1]) == expected
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert open_store(place[0], elsewhere).pull_study()
    assert names(elsewhere) == expected
    assert json.loads((elsewhere / "study.json").read_text())["created"] == "then"


def test_only_what_changed_is_written_and_what_vanished_is_deleted(study, place):
    before = {name: (place[1] / name).stat().st_mtime_ns for name in names(place[1])}
    put(study.folder, "running/checkpoints/epoch-00002/state.json", {"second": 2})
    (study.folder / "running/checkpoints/epoch-00001/training.pt").unlink()
    study.push("", TRIAL, "running")
    there = names(place[1])
    assert "running/checkpoints/epoch-00002/state.json" in there
    assert "running/checkpoints/epoch-00001/training.pt" not in there
    same = there & before.keys()
    assert len(same) == 4
    assert all((place[1] / name).stat().st_mtime_ns == before[name] for name in same)


def test_each_trials_events_go_alone_or_with_all_others(study, place):
    def events():
        return {n.partition("tensorboard/")[2] for n in names(place[1]) if "tensorboard" in n}

    for name in ("a/events", "b/events", "events"):
        put(study.folder, f"tensorboard/{name}", name)
    study.push("tensorboard/a")
    assert events() == {"a/events"}
    study.push("tensorboard")
    assert events() == {"a/events", "b/events", "events"}
    (study.folder / "tensorboard/a/events").unlink()
    study.push("tensorboard/b")
    assert events() == {"a/events", "b/events", "events"}
    study.push("tensorboard")
    assert events() == {"b/events", "events"}
    (study.folder / "tensorboard/b/events").unlink()
    study.push("tensorboard/b")
    assert events() == {"events"}


def test_of_one_trial_no_other_is_looked_at(study):
    put(study.folder, "tensorboard/a/events", "x")
    study.push("tensorboard")
    assert {name.partition("/")[0] for name in study._within("running")} == {"running"}
    assert set(study._within("")) == {"study.json"}
    assert set(study._within("tensorboard/a")) == {"tensorboard/a/events"}


def test_another_process_knows_nothing_and_still_deletes_what_vanished(study, place):
    (study.folder / "running/checkpoints/epoch-00001/training.pt").unlink()
    open_store(place[0], study.folder).push("running")
    assert "running/checkpoints/epoch-00001/training.pt" not in names(place[1])
    assert f"{TRIAL}/results.json" in names(place[1])


@pytest.mark.parametrize("most", range(4))
def test_a_push_that_is_cut_off_vouches_for_nothing_that_is_missing(tmp_path, monkeypatch, most):
    """Whatever was written before the cut: a state.json comes after its tensors, results last."""
    folder = tmp_path / "here"
    put(folder, "t/checkpoints/epoch-00001/state.json", {})
    put(folder, "t/checkpoints/epoch-00001/training.pt", "tensors")
    put(folder, "t/results.json", {})
    put(folder, "t/a.json", {})
    store = open_store((tmp_path / "store").as_uri(), folder)
    written, whole = [], remote.write

    def cut(where, name, content):
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(name.rpartition("/")[2])
        whole(where, name, content)

    monkeypatch.setattr(remote, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        store.push("t")
    order = ["a.json", "training.pt", "state.json"]
    assert written == order[:most]
    assert len(names(tmp_path / "store")) == most


def test_pulling_makes_the_local_folder_what_the_store_holds(study, place):
    put(study.folder, "running/results.json", {"status": "interrupted", "newer": 1})
    put(study.folder, "running/checkpoints/epoch-00009/state.json", {})
    put(study.folder, "never pushed/results.json", {})
    finished = (study.folder / TRIAL / "results.json").stat().st_mtime_ns
    assert open_store(place[0], study.folder).pull_study()
    assert json.loads((study.folder / "running/results.json").read_text()) == {
        "status": "interrupted"
    }
    here = names(study.folder)
    assert {"run-1/running/result.json"} == here - names(place[1])
    assert (study.folder / TRIAL / "results.json").stat().st_mtime_ns == finished  # not again


def test_a_trial_alone_is_pulled(study, place, tmp_path):
    node = tmp_path / "node"
    put(node, "running/stale.json", {})
    open_store(place[0], node).pull("running")
    assert names(node) == {name for name in names(place[1]) if name.startswith("running/")}


def test_a_store_without_a_study_leaves_the_local_one_alone(study, tmp_path):
    other = open_store((tmp_path / "empty").as_uri(), study.folder)
    before = names(study.folder)
    assert not other.pull_study()
    assert names(study.folder) == before


@pytest.mark.parametrize("what", ["study.json", "notes.txt"])
def test_what_is_not_of_this_store_is_not_thrown_away(study, place, tmp_path, what):
    folder = tmp_path / "mine"
    put(folder, what, {"created": "another time", "plan": []})
    with pytest.raises(UserError, match="holds something else") as error:
        open_store(place[0], folder).pull_study()
    assert "--output-dir" in str(error.value)
    assert names(folder) == {what}


def test_names_that_leave_the_folder_are_refused(tmp_path):
    put(tmp_path / "store", "a", "b")
    with pytest.raises(RemoteError, match="no name"):
        remote.fetch(
            open_remote((tmp_path / "store").as_uri()), tmp_path / "here", ["../../escaped"]
        )


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://KEY:SEC%2FRET@bucket/path?region=x", "s3://***@bucket/path?region=x"),
        ("s3://KEY:SE/CRET@bucket/path", "s3://***@bucket/path"),
        ("abfs://c@account/p?account_key=SECRET&x=1", "abfs://***@account/p?account_key=***&x=1"),
        ("gs://bucket/p?sasToken=SECRET", "gs://bucket/p?sasToken=***"),
        (
            "python -m x --storage s3://K:S@b/c --name a",
            "python -m x --storage s3://***@b/c --name a",
        ),
        ("s3://bucket/path", "s3://bucket/path"),
    ],
)
def test_secrets_in_a_uri_are_masked(uri, shown):
    assert masked(uri) == shown


@pytest.mark.parametrize("uri", ["nonsense://x/y", "file://KEY:SECRET@host/x", "s3://"])
def test_a_uri_that_cannot_be_used_is_one_sentence_without_its_secret(uri, tmp_path):
    with pytest.raises(UserError, match="--storage") as error:
        open_store(uri, tmp_path)
    assert "\n" not in str(error.value)
    assert "SECRET" not in str(error.value)


def test_paths_are_told_from_uris():
    assert remote.is_uri("s3://bucket/path")
    assert not remote.is_uri("C://path")
    assert not remote.is_uri("ray_results/demo")
    assert remote.join("s3://b/p/?region=x", "name") == "s3://b/p/name?region=x"


def test_a_store_that_goes_away_is_waited_for_and_then_said(study, place, monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", (0.01, 0.01))
    (place[1] / "running" / "late.json").mkdir()  # a folder in the way of a file
    put(study.folder, "running/late.json", {})
    with pytest.raises(StorageLost, match="repeat the command") as error, plainly():
        study.push("running")
    assert error.value.exit_code == 1
    waits = []

    def mend(seconds):
        waits.append(seconds)
        (place[1] / "running" / "late.json").rmdir()

    monkeypatch.setattr(remote.time, "sleep", mend)
    study.push("running")
    assert waits == [0.01]
    assert (place[1] / "running" / "late.json").is_file()


class Pushes:
    """In place of a store: what was pushed, and how it went."""

    def __init__(self, folder=None, fails=False):
        self.folder, self.remote, self.fails, self.pushed = folder, None, fails, []

    def push(self, *parts):
        if self.fails:
            raise RemoteError("gone")
        self.pushed.append(parts)


def test_an_epoch_is_pushed_before_it_is_reported_and_a_trial_at_its_end():
    pushes, rows = Pushes(), []

    def report(row):
        assert len(pushes.pushed) == len(rows) + 1
        rows.append(row)

    with kept(pushes, TRIAL, report) as pushing:
        pushing({"epoch": 1})
        pushing({"epoch": 2})
    assert rows == [{"epoch": 1}, {"epoch": 2}]
    assert pushes.pushed == [(TRIAL,)] * 3
    with kept(None, TRIAL, report) as plain:
        assert plain is report


@pytest.mark.parametrize(("error", "count"), [(ValueError, 1), (RemoteError, 0), (KeyError, 1)])
def test_what_a_failed_trial_leaves_is_pushed_where_there_is_a_store(error, count):
    pushes = Pushes()
    with pytest.raises(error), kept(pushes, TRIAL, print):
        raise error("planted")
    assert pushes.pushed == [(TRIAL,)] * count


def test_a_runs_end_pushes_the_failed_trials_and_the_report(tmp_path):
    good, ended = ["completed", "early_stopped"], ["pruned", "diverged", "oom", "error"]
    statuses = [*good, *ended, "interrupted", "pending"]
    for status in statuses:
        put(tmp_path, f"{status}/results.json", {"status": status})
    pushes = Pushes(tmp_path)
    push_end(pushes, statuses)
    assert pushes.pushed == [*((status,) for status in ended), ("report", "tensorboard", "")]
    with pytest.raises(StorageLost):
        push_end(Pushes(tmp_path, fails=True), [])


def test_a_runs_start_pushes_what_is_here_or_there(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(remote, "listing", lambda where: ["there/results.json", "study.json"])
    pushes = Pushes(tmp_path)
    push_all(pushes, ["here", "there", "nowhere"])
    assert pushes.pushed == [("here", "there"), ("report", "tensorboard", "")]


def test_the_place_of_a_study_is_under_the_uri():
    assert place_of(None, "name") is None
    assert place_of("s3://bucket/path", "my study") == "s3://bucket/path/my%20study"
    with pytest.raises(UserError, match="--storage folder: write a URI"):
        place_of("folder", "name")


def test_a_run_without_a_store_holds_none_and_one_with_it_has_pulled(study, place, tmp_path):
    with held(None, tmp_path, print, print) as none:
        assert none is None
    folder = tmp_path / "pulled"
    folder.mkdir()
    with held(place[0], folder, print, pytest.fail) as store:
        assert (folder / "study.json").is_file()
        assert store.folder == folder
        assert (place[1] / ".lease.json").is_file()
    assert not (place[1] / ".lease.json").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("study.json", ""),
        ("a/b", "a"),
        ("a/b/c", "a"),
        ("report/figures/x.png", "report"),
        ("tensorboard/a/events", "tensorboard/a"),
        ("tensorboard/a/b/events", "tensorboard/a"),
        ("tensorboard/events", "tensorboard"),
    ],
)
def test_what_a_file_is_a_part_of(name, part):
    assert _part_of(name) == part


def test_pushing_one_trial_leaves_the_others_there_alone(study, place):
    other = open_store(place[0], study.folder)
    shutil.rmtree(study.folder / TRIAL)
    (study.folder / "running/results.json").unlink()
    other.push("running")
    assert f"{TRIAL}/results.json" in names(place[1])
    assert "running/results.json" not in names(place[1])
    other.push(TRIAL)
    assert f"{TRIAL}/results.json" not in names(place[1])
    assert "study.json" in names(place[1])


@pytest.mark.parametrize("there", ["completed", "newer"])
def test_an_ended_trial_is_fetched_where_the_store_says_otherwise(study, place, there):
    put(place[1], f"{TRIAL}/results.json", {"status": "completed", "note": there})
    put(study.folder, f"{TRIAL}/results.json", {"status": "completed", "note": "completed"})
    put(study.folder, f"{TRIAL}/extra.txt", "only here")
    assert open_store(place[0], study.folder).pull_study()
    assert (study.folder / TRIAL / "extra.txt").exists() is (there == "completed")
    assert json.loads((study.folder / TRIAL / "results.json").read_text())["note"] == there
