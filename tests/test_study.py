import json
from pathlib import Path

import pytest
import timm
import torch
from ray import tune

from search_spaces import grids
from tune_study import study
from tune_study.config import UserError
from tune_study.files import write_json
from tune_study.trainable import RunContext

CHECKSUMS = {"data": {"digits": {"sha256": "d"}}, "weights": {"m": {"sha256": "w"}}}


def context(tmp_path, **fields):
    return RunContext(study_dir=tmp_path / "study", **fields)


def test_the_full_grid_is_the_matrix_of_144_distinct_trials():
    trials = study.plan(grids.full())
    assert len(trials) == 144
    assert len({trial.trial_id for trial in trials}) == 144
    assert len({trial.configuration for trial in trials}) == 12
    axes = {
        (t.model, t.dataset, t.lora.r, t.lora.lora_alpha, t.quantization.mode, t.seed)
        for t in trials
    }
    assert len(axes) == 144
    assert {(t.lora.r, t.lora.lora_alpha) for t in trials} == {(4, 8), (8, 16), (16, 32)}
    assert {t.seed for t in trials} == {42, 123, 456}
    training = trials[0].training
    assert (training.num_train_epochs, training.learning_rate) == (15, 1e-4)
    assert (training.weight_decay, training.warmup_steps, training.max_grad_norm) == (0.01, 100, 1)
    assert all(t.lora.lora_dropout == 0.1 and t.pretrained for t in trials)


def test_a_study_that_stops_early_has_compared_all_modes():
    trials = study.plan(grids.full())
    first = trials[:4]
    assert [t.quantization.mode for t in first] == ["none", "int8", "nf4", "nf4-dq"]
    assert len({(t.configuration, t.seed) for t in first}) == 1
    assert len({t.configuration for t in trials[:48]}) == 12  # one seed of everything first


def test_every_axis_of_the_built_in_grids_is_a_grid_search():
    for grid in (grids.full, grids.demo, grids.smoke):
        space = grid()
        for axis in ("model", "dataset", "lora", "quantization", "seed"):
            assert set(space[axis]) == {"grid_search"}
    assert len(study.plan(grids.demo())) == 12
    assert {t.quantization.mode for t in study.plan(grids.smoke())} == set(grids.MODES)


def test_set_replaces_an_axis_and_equal_cells_become_one():
    trials = study.plan(grids.full(), [("quantization.mode", "nf4"), ("seed", 1)])
    assert len(trials) == 12
    assert {t.quantization.mode for t in trials} == {"nf4"}


def test_a_grid_of_the_users_own(tmp_path):
    path = tmp_path / "my_grid.py"
    path.write_text(
        "from ray import tune\n"
        "def mine():\n"
        "    return {'model': 'vit_glyphs_patch4_32', 'dataset': 'digits',\n"
        "            'training': {'learning_rate': tune.grid_search([1e-3, 1e-4])}}\n"
        "def draws():\n"
        "    return {'model': 'm', 'dataset': 'digits', 'seed': tune.choice([1, 2])}\n"
        "def wrong():\n"
        "    return {'model': 'm', 'dataset': 'digits', 'lora': {'r': tune.grid_search([4, 0])}}\n"
        "def fails():\n"
        "    raise RuntimeError('oh no')\n"
        "def number():\n"
        "    return 3\n"
    )
    name, space = study.load_grid(f"{path}:mine")
    assert name == "mine"
    assert [t.training.learning_rate for t in study.plan(space)] == [1e-3, 1e-4]
    with pytest.raises(UserError, match=r"tune\.grid_search"):
        study.plan(study.load_grid(f"{path}:draws")[1])
    with pytest.raises(UserError, match=r"lora\.r = 0"):
        study.plan(study.load_grid(f"{path}:wrong")[1])
    for function, words in (("fails", "oh no"), ("number", "param_space"), ("none", "none")):
        with pytest.raises(UserError, match=words):
            study.load_grid(f"{path}:{function}")


@pytest.mark.parametrize("grid", ["fulll", "MODES", "tune", "nowhere.py:f", ":f", ""])
def test_unknown_grids_are_refused(grid):
    with pytest.raises(UserError, match="--grid"):
        study.load_grid(grid)


def test_the_device_is_honoured_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert study.choose_device("auto") == "cpu"
    for device in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"--device {device}"):
            study.choose_device(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert study.choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert study.choose_device("auto") == "cuda"


def test_preflight_finds_the_inputs_and_their_checksums(tiny, tmp_path):
    trials = [tiny("none"), tiny("nf4")]
    checked = study.preflight(trials, context(tmp_path))
    shipped = Path(timm.get_pretrained_cfg("vit_glyphs_patch4_32").file)
    entry = checked.checksums["weights"]["vit_glyphs_patch4_32"]
    assert entry["sha256"] == study.file_sha256(shipped)
    assert len(checked.checksums["data"]["digits"]["sha256"]) == 64
    assert checked.data[trials[0].trial_id] is checked.data[trials[1].trial_id]
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "vit_nothing"}, "timm has no such model"),
        ({"dataset": "cifar10"}, "--data-dir"),
        ({"data": {"train_size": 10**6}}, "data.train_size"),
        ({"data": {"image_size": 33}}, "multiple"),
        ({"quantization": {"mode": "nf4", "skip_layers": ["x"]}}, "matches no layer"),
    ],
)
def test_preflight_refuses_before_anything_is_written(tiny, tmp_path, fields, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        study.preflight([tiny("nf4", **fields)], context(tmp_path, data_dir=tmp_path / "empty"))
    assert not (tmp_path / "study").exists()


def open_study(trials, where, checksums=CHECKSUMS):
    study.open_study(trials, where, checksums, grid="g", command="c")
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
    assert study.open_study(trials, where, CHECKSUMS, **reopen) == []
    assert study.open_study(trials, where, CHECKSUMS, **reopen) == []
    versions = {**study.provenance.versions(), "torch": "9.9"}
    monkeypatch.setattr(study.provenance, "versions", lambda: versions)
    (note,) = study.open_study(trials, where, CHECKSUMS, **reopen)
    assert "torch was" in note
    assert "and is 9.9" in note
    other = where.model_copy(update={"device": "mps"})
    (note,) = study.open_study(trials, other, CHECKSUMS, **reopen)
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
    (note,) = study.open_study([trial], where, CHECKSUMS, grid="g", command="c")
    assert "not whole" in note
    assert study.planned_ids(where.study_dir) == {trial.trial_id}
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


def test_only_our_own_results_say_that_a_trial_is_done(tiny, tmp_path):
    trials = [tiny(mode) for mode in ("none", "int8", "nf4", "nf4-dq", "fp4")]
    folder = tmp_path / "study"
    for trial, status in zip(
        trials, ("completed", "interrupted", "error", "early_stopped"), strict=False
    ):
        (folder / trial.trial_id).mkdir(parents=True)
        write_json(folder / trial.trial_id / "results.json", {"status": status})
    waiting = [trial.quantization.mode for trial in study.todo(trials, folder)]
    assert waiting == ["int8", "fp4"]
    again = [t.quantization.mode for t in study.todo(trials, folder, retry_failed=True)]
    assert again == ["int8", "nf4", "fp4"]
    (folder / trials[0].trial_id / "results.json").write_text('{"status": "compl')
    assert trials[0] in study.todo(trials, folder)
    study.forget(trials, folder)
    assert not (folder / trials[2].trial_id).exists()
    assert (folder / trials[3].trial_id).exists()


def test_grid_search_inside_a_nested_field():
    space = {
        "model": "m",
        "dataset": "digits",
        "training": {"learning_rate": tune.grid_search([0.1, 0.2])},
        "seed": tune.grid_search([1, 2]),
    }
    assert len(study.plan(space)) == 4
