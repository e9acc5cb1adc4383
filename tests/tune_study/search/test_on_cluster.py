"""A search whose trials run on nodes without the command's folder: a store lies between."""

import shutil
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from tests.tune_study.search.test_suggestions import drive, opened, planned, settings, states
from tune_study.cluster import trainable
from tune_study.cluster.stop import Stop
from tune_study.config import TrialConfig
from tune_study.folder import remote
from tune_study.folder.files import write_json
from tune_study.folder.results import read_results, status_of
from tune_study.folder.store import StorageLost, Store
from tune_study.search.search import Search
from tune_study.search.suggestions import Suggestions, tune_config
from tune_study.trial import simulate
from tune_study.trial.context import Simulation

WANTED = settings(num_samples=6)
SILENT = SimpleNamespace(say=lambda line: None, expect=lambda *_: None)
MOMENTS = ("suggested", "begun", "ran", "told")


@pytest.fixture
def uri(tmp_path, monkeypatch):
    """Of the study's place. Nodes work in a folder of their own."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr(trainable, "node_folder", lambda study: node / study)
    return (tmp_path / "store" / "s").as_uri()


def begun(folder, uri, wanted=WANTED):
    """(search, store) of a command that begins in ``folder``, with what the store has."""
    folder.mkdir(parents=True)
    store = Store(remote.open_remote(uri), folder)
    store.pull_study()
    search = opened(folder, wanted)
    where = search.context.model_copy(update={"storage": uri, "on_cluster": True})
    search = Search(search.settings, where, search.trials)
    search.begin(SILENT, store)
    store.push("")
    return search, store


def run_on_node(search, suggestion, report=lambda row: None):
    config = TrialConfig.model_validate(suggestion["trial"])
    with trainable.at_work(config, search.context, None, report) as (where, pushing):
        assert where.study_dir != search.context.study_dir
        simulate.execute(config, Simulation(), where.study_dir, pushing)


def go_on(search, store, killed=None):
    """As Tune does it, with one trial at a time, until the end or (count, moment)."""
    Stop.reset()
    searcher = Suggestions(search)
    for number in range(100):
        doomed = killed[1] if killed and killed[0] == number else None
        suggestion = searcher.suggest(f"tune{number}")
        if suggestion == Searcher.FINISHED or doomed == "suggested":
            return searcher
        store.push("")
        if doomed == "begun":
            return searcher
        run_on_node(search, suggestion)
        if doomed == "ran":
            return searcher
        searcher.on_trial_complete(f"tune{number}", {})
        if doomed == "told":
            return searcher
        store.push("")
    raise AssertionError("it never finishes")


def learned(searcher):
    return [
        (trial.params, trial.values, trial.state)
        for trial in searcher.study.trials
        if trial.state != TrialState.FAIL  # asked, and killed before anyone knew of it
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(plan, what Optuna learned) of an uninterrupted search on one machine."""
    folder = tmp_path_factory.mktemp("whole")
    return learned(drive(opened(folder, WANTED))), planned(folder)


def test_optuna_is_told_what_nodes_have_pushed(tmp_path, uri, whole):
    searcher = go_on(*begun(tmp_path / "one", uri))
    assert states(searcher) == ["COMPLETE"] * 6
    assert (learned(searcher), planned(tmp_path / "one")) == whole


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_goes_on_from_another_folder(tmp_path, uri, whole, moment):
    go_on(*begun(tmp_path / "one", uri), killed=(3, moment))
    shutil.rmtree(tmp_path / "one")
    searcher = go_on(*begun(tmp_path / "two", uri))
    assert (learned(searcher), planned(tmp_path / "two")) == whole


def test_a_result_is_told_once_the_store_answers(tmp_path, uri, monkeypatch):
    """Tune calls a second time when the first has failed."""
    search, _ = begun(tmp_path / "one", uri)
    searcher = Suggestions(search)
    run_on_node(search, searcher.suggest("tune0"))

    def lost(part):
        raise remote.RemoteError("planted")

    with monkeypatch.context() as away:
        away.setattr(search._store, "pull", lost)
        with pytest.raises(StorageLost, match="planted"):
            searcher.on_trial_complete("tune0", error=True)
    assert states(searcher) == ["RUNNING"]
    searcher.on_trial_complete("tune0", error=True)
    assert states(searcher) == ["COMPLETE"]


def test_a_pruned_trial_keeps_its_epochs_and_is_pruned_in_the_store(tmp_path, uri):
    """Its worker waits for the answer; what it has pushed so far is in the store alone."""
    asha = settings(
        num_samples=3,
        objectives=["val_accuracy"],
        scheduler="asha",
        assignments=[("training.num_train_epochs", 4)],
    )
    search, _ = begun(tmp_path / "one", uri, asha)
    searcher, scheduler = Suggestions(search), tune_config(search, 1)["scheduler"]
    search.context = search.context.model_copy(update={"simulation": None})
    for number, accuracy in enumerate((0.9, 0.1)):
        suggestion = searcher.suggest(f"tune{number}")
        config = TrialConfig.model_validate(suggestion["trial"])
        trial = SimpleNamespace(trial_id=f"tune{number}", config=suggestion)
        scheduler.on_trial_add(None, trial)
        row = {"epoch": 1, "val_accuracy": accuracy}
        with trainable.at_work(config, search.context, None, lambda row: None) as (where, push):
            (where.study_dir / config.trial_id).mkdir(parents=True)
            there = {"status": "interrupted", "train": {"epochs": [row]}}
            write_json(where.study_dir / config.trial_id / "results.json", there)
            push(row)
        decision = scheduler.on_trial_result(None, trial, row)
    assert decision == "STOP"
    searcher.on_trial_complete("tune1", row)
    assert states(searcher) == ["RUNNING", "PRUNED"]
    other = Store(remote.open_remote(uri), tmp_path)
    other.pull(config.trial_id)
    assert status_of(tmp_path, config.trial_id) == "pruned"
    assert read_results(tmp_path, config.trial_id)["train"]["epochs"] == [row]


def test_nodes_get_what_the_space_may_ask_for(tmp_path):
    search = opened(tmp_path, settings(num_samples=2))
    assert len({trial.quantization.mode for trial in search.expected}) > 1
    drive(search)
    assert search.expected[:2] == search.trials
