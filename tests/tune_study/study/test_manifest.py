import hashlib
import json

import pytest

from search_spaces.own_code import Code
from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.machine import provenance
from tune_study.study import manifest
from tune_study.trial.context import RunContext, Simulation

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


def own(text, *models, file="mine.py", function="grid"):
    """The user's own file, as the command read it."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Code(f"/home/me/{file}", function, text, sha256, models)


def test_the_code_of_own_models_is_kept_and_not_changed(tiny, tmp_path):
    trials = [tiny("none")]

    def opened(*code):
        return open_study(trials, context(tmp_path, code=code[0] if code else None))["provenance"]

    first = own("DEPTH = 1", "vit")
    assert opened(own("SEEDS = [1]"))["code"]["mine.py"]["models"] == []
    assert opened(own("SEEDS = [2]"))["code"]["mine.py"]["text"] == "SEEDS = [2]"
    kept = opened(first)["code"]["mine.py"]
    assert kept == {
        "path": "mine.py",
        "function": "grid",
        "text": "DEPTH = 1",
        "sha256": first.sha256,
        "models": ["vit"],
        "transforms": [],
    }
    assert opened()["code"]["mine.py"] == kept
    assert set(opened(own("DEPTH = 2", "other", file="b.py"))["code"]) == {"mine.py", "b.py"}
    for changed in (own("DEPTH = 2", "vit"), own("DEPTH = 2", "vit", file="c.py")):
        with pytest.raises(UserError, match=r"the code of vit in .\w*\.py \(sha256 \w{12}, then"):
            opened(changed)


def test_the_code_of_transforms_is_kept_and_not_changed(tiny, tmp_path):
    trials = [tiny("none")]

    def opened(text, *transforms, file="mine.py"):
        code = own(text, file=file)._replace(transforms=transforms)
        return open_study(trials, context(tmp_path, code=code))["provenance"]["code"]

    assert (
        opened(
            "def grid():\n    return 1",
        )["mine.py"]["transforms"]
        == []
    )
    assert opened("NOISE = 1", "b")["mine.py"]["transforms"] == ["b"]  # the study is extended
    assert opened("NOISE=1 # as b", "a")["mine.py"]["transforms"] == ["a", "b"]
    kept = opened("NOISE  =  1")["mine.py"]  # of a command that names none of their trials
    assert (kept["transforms"], kept["text"]) == (["a", "b"], "NOISE=1 # as b")
    assert opened("NOISE = 2", "c", file="c.py")["c.py"]["transforms"] == ["c"]
    for transforms, file in ((("a",), "mine.py"), ((), "mine.py"), (("a",), "d.py")):
        with pytest.raises(UserError, match=r"the code of a in \w*\.py \(sha256 \w{12}, then"):
            opened("NOISE = 3", *transforms, file=file)


def test_of_two_studies_the_text_stays_that_trials_were_transformed_by():
    plain = {"code": {"m.py": own("A = 1", file="m.py").record()}}
    used = {"code": {"m.py": own("A = 2", file="m.py")._replace(transforms=("f",)).record()}}
    for pair in ((plain, used), (used, plain)):
        kept = manifest.joined(*pair)["code"]["m.py"]
        assert (kept["text"], kept["transforms"]) == ("A = 2", ["f"])
    assert manifest.joined({}, plain)["code"] == plain["code"]


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


def test_each_session_is_held_against_the_one_before_it(tiny, tmp_path, monkeypatch):
    where, trials = context(tmp_path, num_threads=2), [tiny("none")]
    monkeypatch.setattr(provenance, "commit", lambda: "a")
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "x", "cores": 2})
    open_study(trials, where)
    monkeypatch.setattr(provenance, "commit", lambda: "b")
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "y", "cores": 2})
    again = where.model_copy(update={"num_threads": 3})
    (note,) = manifest.review(trials, again, CHECKSUMS).notes
    assert "(cpu was x and is y; commit was a and is b; num_threads was 2 and is 3)" in note
    open_study(trials, again)
    assert manifest.review(trials, again, CHECKSUMS).notes == []


def test_a_simulated_study_says_what_is_planted_and_stays_so(tiny, tmp_path):
    trials, effects = [tiny("none")], {"nf4": -0.25}
    where = context(tmp_path, simulation=Simulation(effects=effects))
    found = open_study(trials, where)
    assert found["simulated"] is True
    assert found["simulation"] == {"effects": effects, "seed_sd": 0.004}
    assert (found["format"], found["study"], found["grid"], found["command"]) == (
        1,
        "study",
        "g",
        "c",
    )
    assert found["device"] == "cpu"
    assert found["sessions"][0]["command"] == "c"
    assert "search" not in found
    with pytest.raises(UserError, match=r"that study is simulated with .* would be real"):
        open_study(trials, context(tmp_path))
    with pytest.raises(UserError, match=r"that study is simulated with .* would be simulated with"):
        open_study(trials, context(tmp_path, simulation=Simulation()))


def test_a_plan_of_another_version_is_refused(tiny):
    trial = tiny("none")
    cell = {"trial_id": trial.trial_id, **trial.model_dump(mode="json")}
    assert manifest.planned("s", [cell]) == [trial]
    with pytest.raises(UserError, match=r"study s: its plan is of another version .'other' would"):
        manifest.planned("s", [{**cell, "trial_id": "other"}])
    with pytest.raises(UserError, match=r"study s: its plan is of another version .unknown field"):
        manifest.planned("s", [{**cell, "x": 1}])


def test_four_changes_are_listed_and_the_others_counted():
    assert manifest.listed_changes(list("abcd")) == "a; b; c; d"
    assert manifest.listed_changes(list("abcdef")) == "a; b; c; d; and 2 more"


def test_inputs_differ_by_their_checksum_and_new_ones_do_not():
    before = {"data": {"d": {"sha256": "1" * 20}}, "weights": {"m": {"sha256": None}}}
    now = {"data": {"d": {"sha256": "1" * 20}, "e": {"sha256": "2"}}, "weights": {}}
    assert manifest.changed_inputs(before, now) == []
    now = {"data": {"d": {"sha256": "3" * 20}}, "weights": {"m": {"sha256": "4"}}}
    assert manifest.changed_inputs(before, now) == [
        f"the data of d (sha256 {'3' * 12}, then {'1' * 12})",
        "the weights of m (sha256 4, then None)",
    ]
    before["weights"]["m"]["pretrained"] = True  # of a version that took none of such a file
    assert len(manifest.changed_inputs(before, now)) == 1


def test_a_study_of_two_compute_dtypes_has_none(tiny, tmp_path):
    trials = [tiny("none", training={"compute_dtype": name}) for name in ("bf16", "fp32")]
    where = context(tmp_path)
    open_study(trials[:1], where)
    assert manifest.settled_compute_dtype(where.study_dir) == "bf16"
    open_study(trials, where)
    assert manifest.settled_compute_dtype(where.study_dir) is None


def test_hidden_files_do_not_make_a_folder_full(tiny, tmp_path):
    where = context(tmp_path)
    where.study_dir.mkdir()
    (where.study_dir / ".lock").touch()
    assert manifest.review([tiny("none")], where, CHECKSUMS) == (None, _cells(tiny), [])
    assert [path.name for path in where.study_dir.iterdir()] == [".lock"]


def _cells(tiny):
    trial = tiny("none")
    return {trial.trial_id: {"trial_id": trial.trial_id, **trial.model_dump(mode="json")}}


@pytest.mark.parametrize(
    ("change", "where"),
    [({"format": 2}, "format"), ({"plan": [{}]}, "plan.0.trial_id"), ({"created": 3}, "created")],
)
def test_a_study_json_of_another_version_is_refused(tiny, tmp_path, change, where):
    there = context(tmp_path)
    found = open_study([tiny("none")], there)
    write_json(there.study_dir / "study.json", {**found, **change})
    with pytest.raises(UserError, match=f"not of this version of tune-study .{where}: "):
        manifest.planned_ids(there.study_dir)


def test_an_axis_of_the_grid_takes_further_values_and_nothing_else_does(tiny, tmp_path):
    where = context(tmp_path)

    def at(rate, size=None):
        return tiny("none", training={"learning_rate": rate}, data={"image_size": size})

    open_study([at(0.1), at(0.2)], where)
    assert len(open_study([at(0.3)], where)["plan"]) == 3
    with pytest.raises(UserError, match=r"data\.image_size was None and is 48"):
        open_study([at(0.1, 48)], where)


def test_a_study_keeps_where_its_folders_of_images_lie(tiny, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    where = context(tmp_path)
    open_study([tiny("none", dataset="folder:d"), tiny("nf4")], where)
    manifest_ = manifest.read_manifest(where.study_dir)
    assert manifest_["folders"] == {"folder:d": "../d"}
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = manifest.names_in(where.study_dir)
    assert names.of("folder:../d/") == "folder:d"
    assert names.of("digits") == "digits"
    open_study([tiny("int8")], where)
    assert manifest.read_manifest(where.study_dir)["folders"] == {"folder:d": "../d"}
    assert manifest.names_in(tmp_path / "nothing").of("folder:x") == "folder:x"
