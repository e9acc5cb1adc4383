"""A trial that works for a store: on one machine, on a node, and when the store goes away."""

import json
import shutil
import subprocess
import sys

import pytest
import timm

from search_spaces.own_code import Code
from tests.tune_study.trial.test_execution import without_times
from tune_study.cluster import inputs, trainable
from tune_study.cluster.inputs import Inputs
from tune_study.folder import remote
from tune_study.folder.files import write_json
from tune_study.folder.remote import RemoteError
from tune_study.trial import execution, known, simulate
from tune_study.trial.context import RunContext, Simulation
from tune_study.trial.execution import execute


@pytest.fixture
def context(tmp_path):
    uri = (tmp_path / "store" / "study").as_uri()
    return RunContext(study_dir=tmp_path / "driver" / "study", storage=uri)


@pytest.fixture
def config(tiny):
    return tiny("nf4")


@pytest.fixture
def alone(config, tmp_path):
    """The undisturbed trial's results.json."""
    return execute(config, RunContext(study_dir=tmp_path / "alone"), lambda row: None)


def run(config, context, report):
    context.study_dir.mkdir(parents=True, exist_ok=True)
    with trainable.at_work(config, context, None, report) as (where, pushing):
        return execute(config, where, pushing)


def there(tmp_path, config, name):
    return tmp_path / "store" / "study" / config.trial_id / name


def test_a_node_continues_from_what_another_has_pushed(
    context, config, alone, tmp_path, monkeypatch
):
    context = context.model_copy(update={"on_cluster": True})
    context.study_dir.mkdir(parents=True)
    for node in "ab":
        (tmp_path / node).mkdir()

    def dies(row):
        assert there(tmp_path, config, "checkpoints/epoch-00001/state.json").is_file()
        raise KeyboardInterrupt  # as a kill: nothing runs after it

    monkeypatch.setattr(trainable, "node_folder", lambda study: tmp_path / "a" / study)
    with pytest.raises(KeyboardInterrupt):
        run(config, context, dies)
    shutil.rmtree(tmp_path / "a")
    assert json.loads(there(tmp_path, config, "results.json").read_text())["status"] == (
        "interrupted"
    )

    monkeypatch.setattr(trainable, "node_folder", lambda study: tmp_path / "b" / study)
    rows = []
    results = run(config, context, rows.append)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert without_times(results) == without_times(alone)
    assert "continues after epoch 1" in there(tmp_path, config, "trial.log").read_text()
    assert there(tmp_path, config, "adapter/adapter_model.safetensors").is_file()
    assert not there(tmp_path, config, "checkpoints").is_dir() or not list(
        there(tmp_path, config, "checkpoints").rglob("*.pt")
    )
    assert not (tmp_path / "b" / "study" / config.trial_id).exists()  # the store has it
    assert not list(context.study_dir.iterdir())  # the driver's folder is the driver's


def test_a_store_that_goes_away_fails_no_trial(context, config, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", ())
    store, rows = tmp_path / "store", []

    def breaks(row):
        rows.append(row)
        shutil.rmtree(store)
        store.write_text("a file in the way")

    with pytest.raises(RemoteError, match="writing"):
        run(config, context, breaks)
    assert [row["epoch"] for row in rows] == [1]  # what is not kept is not reported
    folder = context.study_dir / config.trial_id
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    assert not (folder / "error.json").exists()
    store.unlink()
    assert without_times(run(config, context, rows.append)) == without_times(alone)
    assert (
        there(tmp_path, config, "results.json").read_bytes()
        == (folder / "results.json").read_bytes()
    )


def test_what_a_failed_trial_says_of_itself_is_kept(context, config, tmp_path):
    def fails(row):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        run(config, context, fails)
    assert json.loads(there(tmp_path, config, "error.json").read_text())["message"] == "planted"


def test_the_context_goes_to_ray_as_json(config, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(execution, "execute", lambda *given: ran.append(given[:2]))
    code = Code("my_model.py", "grid", "def for_trials(): ...", "its sha", ("for_trials",))
    context = RunContext(study_dir=tmp_path, code=code)
    carried = json.loads(context.model_dump_json())
    trainable.run_trial({"trial": config.model_dump(mode="json")}, carried)
    assert ran == [(config, context)]


WITHOUT_TORCH = """
import json, sys
from pathlib import Path
from tune_study.cluster import trainable
config, context, node = json.loads(sys.argv[1])
trainable.node_folder, rows = lambda study: Path(node), []
trainable.tune.report = rows.append
trainable.run_trial(config, context)
heavy = {"bitsandbytes", "peft", "sklearn", "timm", "torch", "torchvision", "transformers"}
print(json.dumps([len(rows), sorted(heavy & {name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("on_cluster", [False, True])
def test_a_simulated_trial_loads_no_torch_and_says_the_same(config, tmp_path, on_cluster):
    """Nor does it run the user's own file, which may load what it likes."""
    simulation, store = Simulation(effects={"nf4": -0.1}), tmp_path / "store"
    context = RunContext(
        study_dir=tmp_path / "here",
        storage=store.as_uri(),
        on_cluster=on_cluster,
        simulation=simulation,
        code=Code("my_model.py", "grid", "import torch", "its sha", ()),
    )
    context.study_dir.mkdir()
    told = {"trial": config.model_dump(mode="json"), "known": known.known_of(config)}
    given = json.dumps([told, context.model_dump(mode="json"), str(tmp_path / "node")])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, given], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, []]
    expected = tmp_path / "expected.json"
    write_json(expected, simulate.results_of(config, simulation))
    results = store / config.trial_id / "results.json"
    assert results.read_bytes() == expected.read_bytes()


def test_on_a_node_the_users_own_models_are_known_before_the_inputs_come(
    config, context, tmp_path, monkeypatch
):
    known = []

    def receive(inputs, trial, context, folder):
        known.append(timm.list_models("for_inputs"))
        return context

    monkeypatch.setattr(trainable, "node_folder", lambda study: tmp_path / "node" / study)
    monkeypatch.setattr(inputs, "receive", receive)
    (tmp_path / "node" / "study" / config.trial_id).mkdir(parents=True)
    text = "from timm.models import register_model\n@register_model\ndef for_inputs(): ..."
    code = Code("my_model.py", "grid", text, "sha of it", ("for_inputs",))
    context = context.model_copy(update={"on_cluster": True, "code": code})
    with trainable.at_work(config, context, Inputs({}, {}), lambda row: None):
        pass
    assert known == [["for_inputs"]]
