"""Studies of several machines become one folder, whole or not at all, which goes on as a study."""

import json
import shutil

import pandas as pd
import pytest

from analysis.load import read_study, rebuild
from search_spaces.own_code import Code
from tune_study import merge
from tune_study.config import parse_trial
from tune_study.errors import UserError
from tune_study.folder.files import read_json, write_json
from tune_study.study import manifest, status
from tune_study.study.session import collect
from tune_study.trial import simulate
from tune_study.trial.context import RunContext, Simulation

NOTHING = Simulation()
CHECKSUMS = {"data": {"cifar10": {"sha256": "d"}}, "weights": {"m": {"sha256": "w"}}}


def trials(seeds, **training):
    return [
        parse_trial(
            {
                "model": "deit_tiny_patch16_224",
                "dataset": "cifar10",
                "quantization": mode,
                "seed": seed,
                "training": {"num_train_epochs": 2, **training},
            }
        )
        for seed in seeds
        for mode in ("none", "nf4")
    ]


@pytest.fixture
def make(tmp_path):
    """``make(place, planned)``: a simulated study in ``<place>/s``, finished."""

    def build(place, planned, simulation=NOTHING, checksums=CHECKSUMS, code="DEPTH = 1"):
        folder = tmp_path / place / "s"
        own = Code("mine.py", "grid", code, code, ("my_vit",))
        where = RunContext(study_dir=folder, simulation=simulation, code=own)
        manifest.open_study(planned, where, checksums, grid="g", command=place)
        for trial in planned:
            simulate.execute(trial, simulation or NOTHING, folder, lambda row: None)
            events = folder / "tensorboard" / trial.trial_id
            events.mkdir(parents=True)
            (events / "events.out").write_text(place)
        collect(folder)
        return folder

    return build


def change(folder, trial, **fields):
    """Edits a trial's results.json: dotted names as ``meta__commit``."""
    path = folder / trial.trial_id / "results.json"
    results = read_json(path)
    for name, value in fields.items():
        *keys, last = name.split("__")
        inner = results
        for key in keys:
            inner = inner[key]
        inner[last] = value
    write_json(path, results)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["merge", *map(str, arguments)])
    try:
        merge.main()
    except SystemExit as exit_:
        return exit_.code, capsys.readouterr()
    return 0, capsys.readouterr()


def test_two_machines_become_one_study_that_goes_on(make, tmp_path, monkeypatch, capsys):
    one, two = make("one", trials([1, 2])), make("two", trials([2, 3]))
    (one / trials([1])[0].trial_id / "stray").symlink_to("/etc")
    (one / "run-1").mkdir()
    before = contents(one), contents(two)
    output = tmp_path / "all"
    code, said = run(monkeypatch, capsys, one, two, "--output", output)
    assert code == 0, said.err
    assert "6 trials: 4 of s, 2 of s (2)" in said.out
    assert (contents(one), contents(two)) == before
    merged = read_study(output)
    assert not merged.problems
    planned = [trial.trial_id for trial in trials([1, 2, 3])]
    assert list(merged.trials["trial_id"]) == planned
    assert set(merged.trials["status"]) == {"completed"}
    assert len(merged.epochs) == 12
    assert (output / "report" / "report.html").is_file()
    assert not (output / planned[0] / "stray").exists()
    assert not list(output.glob("run-*"))
    for trial_id, place in ((planned[0], "one"), (planned[2], "one"), (planned[5], "two")):
        assert (output / "tensorboard" / trial_id / "events.out").read_text() == place
    found = json.loads((output / "study.json").read_text())
    assert found["merged"]["trials"][planned[2]] == "s"
    assert found["provenance"]["code"]["mine.py"]["text"] == "DEPTH = 1"
    assert found["merged"]["trials"][planned[5]] == "s (2)"
    assert [session["command"] for session in found["sessions"]] == ["one", "two"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # It is a study like any other: one more seed joins it.
    where = RunContext(study_dir=output, simulation=NOTHING)
    manifest.open_study(trials([4]), where, CHECKSUMS, grid="g", command="c")
    assert len(status.todo(trials([1, 2, 3, 4]), output)) == 2
    assert len(rebuild(output).trials) == 8
    assert json.loads((output / "study.json").read_text())["merged"] == found["merged"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"planned": trials([3], learning_rate=0.5)}, "training.learning_rate was 0.0001 and is"),
        ({"simulation": None}, "one/s is simulated with"),
        ({"simulation": Simulation(effects={"nf4": -0.1})}, "one/s is simulated with"),
        ({"checksums": {**CHECKSUMS, "data": {"cifar10": {"sha256": "x"}}}}, "the data of cifar10"),
        ({"checksums": {**CHECKSUMS, "weights": {"m": {"sha256": "x"}}}}, "the weights of m"),
        ({"code": "DEPTH = 2"}, "they differ in the code of my_vit in mine.py"),
    ],
    ids=["protocol", "real", "effects", "data", "weights", "code"],
)
def test_what_does_not_belong_together_is_refused(
    make, tmp_path, monkeypatch, capsys, other, words
):
    one = make("one", trials([1]))
    two = make("two", **{"planned": trials([3]), **other})
    code, said = run(monkeypatch, capsys, one, two, "--output", tmp_path / "all")
    assert code == 2
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "all").exists()


def test_a_trial_that_ended_in_both(make, tmp_path):
    planned = trials([1])
    one, two = make("one", planned), make("two", planned)
    merge.merge([one, two], tmp_path / "equal", "c")
    change(two, planned[0], train__test_metrics={"test_accuracy": 0.5})
    with pytest.raises(
        UserError, match=f"{planned[0].trial_id} ended differently in .*one/s and in .*two/s"
    ):
        merge.merge([one, two], tmp_path / "all", "c")
    change(two, planned[0], meta__hardware={"cpu": "another"})
    _, notes = merge.merge([one, two], tmp_path / "first", "c")
    assert "one/s is kept" in notes[0]
    kept = pd.read_parquet(tmp_path / "first" / "trials.parquet")["test_accuracy"]
    assert kept[0] != 0.5
    assert not (tmp_path / "all").exists()


def test_the_trial_that_got_furthest_is_taken(make, tmp_path):
    planned = trials([1])
    one, two = make("one", planned), make("two", planned)
    change(one, planned[0], status="oom")
    change(two, planned[1], status="interrupted")
    shutil.rmtree(two / planned[0].trial_id)
    _, notes = merge.merge([two, one], tmp_path / "all", "c")
    assert list(pd.read_parquet(tmp_path / "all" / "trials.parquet")["status"]) == [
        "oom",
        "completed",
    ]
    assert notes == ["2 trials: 0 of s, 2 of s (2)"]


def test_it_is_written_whole_or_not_at_all(make, tmp_path, monkeypatch):
    one, two = make("one", trials([1])), make("two", trials([2]))
    before = contents(tmp_path)
    copy = merge._copy

    def full(source, target):
        if source.name == trials([2])[1].trial_id:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(merge, "_copy", full)
    with pytest.raises(UserError, match="No space left on device"):
        merge.merge([one, two], tmp_path / "all", "c")
    assert contents(tmp_path) == before


def test_folders_that_cannot_be_merged(make, tmp_path):
    one, two = make("one", trials([1])), make("two", trials([2]))
    for folders, output, words in (
        ([one], "all", "at least two"),
        ([one, one], "all", "named twice"),
        ([one, tmp_path / "none"], "all", "no whole study.json"),
        ([one, two], "one", "--output .*there already"),
    ):
        with pytest.raises(UserError, match=words):
            merge.merge(folders, tmp_path / output, "c")
    with merge.FileLock(two / ".lock"), pytest.raises(UserError, match="a run of this study"):
        merge.merge([one, two], tmp_path / "all", "c")
    path = two / "study.json"
    text = path.read_text()
    path.write_text(text.replace(trials([2])[0].trial_id, "../../one"))
    with pytest.raises(UserError, match="of another version"):
        merge.merge([one, two], tmp_path / "all", "c")
    path.write_text(json.dumps({**json.loads(text), "search": {"space": "qlora"}}))
    with pytest.raises(UserError, match="it is a search"):
        merge.merge([one, two], tmp_path / "all", "c")
    assert not (tmp_path / "all").exists()


def test_the_order_in_which_a_trial_got_far():
    ends = ("completed", "early_stopped", "pruned", "oom", "error", "diverged", "interrupted")
    assert [merge._rank({"status": end}) for end in ends] == [0, 0, 0, 1, 1, 1, 2]
    assert merge._rank({}) == merge._rank({"status": "pending"}) == 3


def test_conditions_are_all_that_computes():
    meta = {"versions": {"torch": "1"}, "hardware": {"cpu": "x"}, "commit": "a", "else": 1}
    results = {"meta": meta, "run": {"device": "cpu", "num_threads": 2}}
    found = merge._conditions(results)
    for part, name in (
        *(("meta", name) for name in ("versions", "hardware", "commit")),
        ("run", "device"),
        ("run", "num_threads"),
    ):
        other = {**results, part: {**results[part], name: "other"}}
        assert merge._conditions(other) != found
    assert merge._conditions({**results, "meta": {**meta, "else": 2}}) == found
    repeats = [merge._repeats({"run": {"device": name}}) for name in ("cpu", "cuda", "mps", None)]
    assert repeats == [True, False, False, True]


def test_what_an_epoch_repeats():
    row = {"train_loss": 1, "train_accuracy": 2, "val_loss": 3, "val_accuracy": 4}
    results = {"status": "completed", "train": {"epochs": [row], "test_metrics": {"a": 1}}}
    found = merge._learned(results)
    for name in row:
        other = {"epochs": [{**row, name: 9}], "test_metrics": {"a": 1}}
        assert merge._learned({**results, "train": other}) != found
    timed = {"epochs": [{**row, "epoch_time_s": 9}], "test_metrics": {"a": 1}}
    assert merge._learned({**results, "train": timed}) == found


def test_the_first_study_counts_in_the_merged_manifest():
    def source(name, grid, sha256, sessions):
        cells = [{"trial_id": trial, "of": name} for trial in ("a", name)]
        inputs = {"data": {"d": {"sha256": sha256}, name: {}}, "weights": {}}
        there = {"grid": grid, "plan": cells, "provenance": {**inputs, "commit": name}}
        return merge.Source(name, None, {**there, "created": name, "sessions": sessions}, [])

    one, two = source("one", "g", "1", [{"n": 1}]), source("two", "h", "2", [{"n": 2}, {"n": 3}])
    three = source("three", "g", "3", [])
    chosen = {"a": one, "two": two, "one": one}
    found = merge.merged_manifest([one, two, three], chosen, "all", "c")
    assert found["plan"] == [
        {"trial_id": "a", "of": "one"},
        {"trial_id": "two", "of": "two"},
        {"trial_id": "one", "of": "one"},
    ]
    assert found["provenance"]["data"]["d"] == {"sha256": "1"}
    assert set(found["provenance"]["data"]) == {"d", "one", "two", "three"}
    assert found["provenance"]["commit"] == "one"
    assert (found["grid"], found["study"], found["command"], found["format"]) == (
        "g, h",
        "all",
        "c",
        1,
    )
    assert found["created"] != "one"
    assert [(s["study"], s["n"]) for s in found["sessions"]] == [("one", 1), ("two", 2), ("two", 3)]
    assert found["merged"] == {
        "studies": ["one", "two", "three"],
        "trials": {"a": "one", "two": "two", "one": "one"},
    }
