"""Searches without Ray: what Optuna is told, and a search that is killed and goes on."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from search_spaces import optuna_spaces
from tune_study.cluster.stop import Stop
from tune_study.errors import UserError
from tune_study.folder.files import write_json
from tune_study.search import settings as spaces
from tune_study.search.search import STORAGE_FILE, Search, outcome
from tune_study.search.suggestions import STUDY_NAME, Suggestions, finish
from tune_study.study import manifest
from tune_study.study.status import forget
from tune_study.trial import simulate
from tune_study.trial.context import RunContext, Simulation
from tune_study.trial.known import known_of


def settings(**options):
    given = {
        "search": "optuna",
        "space": None,
        "num_samples": None,
        "objectives": None,
        "scheduler": None,
        "seed": None,
        "assignments": [("training.num_train_epochs", 2)],
    }
    return spaces.settings(**{**given, **options})


def opened(folder, wanted):
    """The search in ``folder`` as the command line opens it."""
    where = RunContext(study_dir=folder, simulation=Simulation())
    wanted, trials = spaces.continued(wanted, folder, compute_dtype=None)
    checksums = {"data": {}, "weights": {}}
    manifest.open_study(trials, where, checksums, grid="g", command="c", search=wanted.record())
    return Search(wanted, where, trials)


def drive(search, stop_after=None, kill=False):
    """Runs suggested trials one at a time, as Tune does; the last one is killed if wished."""
    Stop.reset()
    searcher = Suggestions(search)
    for number in range(1000):
        suggestion = searcher.suggest(f"tune{number}")
        if suggestion == Searcher.FINISHED:
            return searcher
        if number + 1 == stop_after and kill:
            return searcher
        config = next(t for t in search.trials if t.trial_id == suggestion["trial_id"])
        assert config.model_dump(mode="json") == suggestion["trial"]
        assert suggestion["known"] == known_of(config)

        def report(row, name=f"tune{number}"):
            searcher.on_trial_result(name, row)

        simulate.execute(config, Simulation(), search.context.study_dir, report)
        searcher.on_trial_complete(f"tune{number}", {})
        if number + 1 == stop_after:
            return searcher
    raise AssertionError("it never finishes")


def planned(folder):
    return [c["trial_id"] for c in json.loads((folder / "study.json").read_text())["plan"]]


def states(searcher):
    return [trial.state.name for trial in searcher.study.trials]


def results(status, accuracy=0.9, weights=100):
    return {
        "status": status,
        "train": {
            "training_results": {"val_accuracy": accuracy},
            "model_metrics": {"weights_bytes": weights},
        },
    }


BOTH = ("val_accuracy", "weights_bytes")


@pytest.mark.parametrize("status", ["interrupted", "pending", None])
def test_a_trial_that_is_to_be_continued_is_not_told(status):
    assert outcome(results(status), BOTH) is None
    assert outcome({}, BOTH) is None


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_an_objective_without_a_number_is_a_failed_trial(value):
    assert outcome(results("completed", accuracy=value), BOTH) == (TrialState.FAIL, None)
    assert outcome(results("completed", weights=value), BOTH) == (TrialState.FAIL, None)
    assert outcome(results("completed", weights=value), BOTH[:1]) == (TrialState.COMPLETE, [0.9])


def test_states():
    assert outcome(results("early_stopped"), BOTH) == (TrialState.COMPLETE, [0.9, 100.0])
    assert outcome(results("pruned"), BOTH[:1]) == (TrialState.PRUNED, None)
    for status in ("diverged", "oom", "error"):
        assert outcome(results(status), BOTH) == (TrialState.FAIL, None)


def test_a_nan_from_a_trial_reaches_optuna_as_a_failure_and_the_search_goes_on(
    tmp_path, monkeypatch
):
    whole = simulate.results_of

    def spoilt(config, simulation, **options):
        content = whole(config, simulation, **options)
        if config.quantization.mode != "none":
            content["train"]["model_metrics"]["weights_bytes"] = math.nan
        return content

    monkeypatch.setattr(simulate, "results_of", spoilt)
    searcher = drive(opened(tmp_path, settings(num_samples=12)))
    modes = [trial.params["quantization.mode"] for trial in searcher.study.trials]
    assert states(searcher) == ["COMPLETE" if mode == "none" else "FAIL" for mode in modes]
    assert {"COMPLETE", "FAIL"} == set(states(searcher))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted search of 16: ten at random, six by what was learned."""
    folder = tmp_path_factory.mktemp("whole")
    drive(opened(folder, settings(num_samples=16)))
    assert len(planned(folder)) == 16
    return folder


def told(folder):
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STORAGE_FILE}")
    trials = optuna.load_study(study_name=STUDY_NAME, storage=storage).trials
    return [(t.params, t.values) for t in trials if t.state == TrialState.COMPLETE]


@pytest.mark.parametrize("moment", [1, 5, 13])
def test_a_killed_search_goes_on_as_if_it_had_not_been(whole, tmp_path, moment):
    first = drive(opened(tmp_path, settings(num_samples=16)), stop_after=moment, kill=True)
    assert states(first)[-1] == "RUNNING"
    interrupted = planned(tmp_path)[-1]
    search = opened(tmp_path, settings(num_samples=16))
    second = Suggestions(search)
    assert second.suggest("tune")["trial_id"] == interrupted  # before anything new
    del second, search
    again = drive(opened(tmp_path, settings(num_samples=16)))
    assert states(again) == ["COMPLETE"] * 16
    assert planned(tmp_path) == planned(whole)
    assert told(tmp_path) == told(whole)


def test_the_last_suggestions_come_from_what_was_learned(whole, tmp_path):
    """Otherwise the test above would hold for random draws."""
    other = settings(num_samples=16)
    search = opened(tmp_path, other)
    drive(search, stop_after=10)
    for trial in search.trials:
        path = tmp_path / trial.trial_id / "results.json"
        content = json.loads(path.read_text())
        content["train"]["training_results"]["val_accuracy"] = 1 - trial.training.learning_rate
        write_json(path, content)
    (tmp_path / STORAGE_FILE).unlink()  # learned anew from the files
    drive(opened(tmp_path, other))
    assert planned(tmp_path)[:10] == planned(whole)[:10]
    assert planned(tmp_path)[10:] != planned(whole)[10:]


def test_a_lost_sqlite_file_is_rebuilt_from_the_trials_own_files(whole, tmp_path):
    drive(opened(tmp_path, settings(num_samples=16)), stop_after=12, kill=True)
    (tmp_path / STORAGE_FILE).unlink()
    drive(opened(tmp_path, settings(num_samples=16)))
    assert planned(tmp_path) == planned(whole)
    assert told(tmp_path) == told(whole)


def test_a_broken_sqlite_file_is_named(tmp_path):
    opened(tmp_path, settings())
    (tmp_path / STORAGE_FILE).write_text("no database" * 100)
    with pytest.raises(UserError, match="no study of Optuna's"):
        opened(tmp_path, settings())


def test_killed_before_the_plan_was_written(whole, tmp_path):
    drive(opened(tmp_path, settings(num_samples=16)), stop_after=3, kill=True)
    manifest = json.loads((tmp_path / "study.json").read_text())
    lost = manifest["plan"].pop()
    del manifest["search"]["params"][lost["trial_id"]]
    write_json(tmp_path / "study.json", manifest)
    again = drive(opened(tmp_path, settings(num_samples=16)))
    assert states(again) == ["COMPLETE"] * 16  # it was asked once, and is continued
    assert planned(tmp_path) == planned(whole)


def test_killed_in_the_middle_of_a_question(whole, tmp_path):
    searcher = drive(opened(tmp_path, settings(num_samples=16)), stop_after=3)
    searcher.study.ask().suggest_categorical("lora.r", [2, 4, 8, 16, 32])
    again = drive(opened(tmp_path, settings(num_samples=16)))
    assert states(again)[3] == "FAIL"
    assert planned(tmp_path) == planned(whole)


def test_more_samples_extend_a_search_and_fewer_run_nothing(whole, tmp_path):
    drive(opened(tmp_path, settings(num_samples=4)))
    drive(opened(tmp_path, settings(num_samples=16)))
    assert planned(tmp_path) == planned(whole)
    drive(opened(tmp_path, settings(num_samples=2)))
    assert planned(tmp_path) == planned(whole)
    assert json.loads((tmp_path / "study.json").read_text())["search"]["num_samples"] == 16


def test_a_failed_trial_that_is_forgotten_runs_again(tmp_path):
    search = opened(tmp_path, settings(num_samples=3))
    drive(search)
    failed = search.trials[1]
    path = tmp_path / failed.trial_id / "results.json"
    write_json(path, {**json.loads(path.read_text()), "status": "error"})
    forget(search.trials, tmp_path)
    again = drive(opened(tmp_path, settings(num_samples=3)))
    assert len(planned(tmp_path)) == 3
    assert path.is_file()
    assert len(states(again)) == 4
    assert again.study.trials[3].user_attrs["trial_id"] == failed.trial_id


def test_another_search_is_refused(tmp_path):
    opened(tmp_path, settings())
    for changed, words in (
        ({"space": "demo"}, "--space qlora and this one has demo"),
        ({"seed": 1}, "--search-seed 0"),
        ({"objectives": ["val_accuracy"]}, "--objective val_accuracy and weights_bytes"),
        ({"objectives": ["val_accuracy"], "scheduler": "asha"}, "--objective"),
        ({"assignments": []}, "--set training.num_train_epochs=2"),
    ):
        with pytest.raises(UserError, match=words):
            opened(tmp_path, settings(**changed))
    where = RunContext(study_dir=tmp_path, simulation=Simulation())
    with pytest.raises(UserError, match="a search of qlora and this one would be a grid"):
        manifest.open_study([], where, {"data": {}, "weights": {}}, grid="g", command="c")


def test_a_space_that_was_edited_is_refused(tmp_path):
    drive(opened(tmp_path, settings(num_samples=2)))

    def edited(trial):
        return {**optuna_spaces.qlora(trial), "seed": 7}

    with pytest.raises(UserError, match="not what this search began with"):
        opened(tmp_path, settings(num_samples=2)._replace(ask=edited))


def test_a_small_space_ends_before_its_samples(tmp_path, capsys):
    def small(trial):
        mode = trial.suggest_categorical("quantization.mode", ["none", "nf4", "int8"])
        return {"model": "vit_glyphs_patch4_32", "dataset": "digits", "quantization": mode}

    search = opened(tmp_path, settings(num_samples=20)._replace(ask=small))
    said = []
    search.begin(SimpleNamespace(say=said.append, expect=lambda *_: None))
    drive(search)
    assert len(planned(tmp_path)) == 3
    assert "the space has no more to offer" in said[0]


def test_a_configuration_that_cannot_be_stops_the_search_with_its_sentence(tmp_path):
    search = opened(tmp_path, settings(num_samples=4))
    drive(search, stop_after=2)
    search.settings = search.settings._replace(ask=lambda trial: {"model": "m"})
    drive(search)
    with pytest.raises(UserError, match="dataset is missing"):
        finish(search)
    assert len(planned(tmp_path)) == 2


def test_analysis_needs_neither_optuna_nor_ray():
    code = "import sys, analysis.report; print({'optuna', 'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


SPACE = """
def own(t):
    skip = t.suggest_categorical("quantization.skip_layers", {choices})
    dropout = t.suggest_float("lora.lora_dropout", 0, {high})
    rank = t.suggest_int("lora.r", 1, 8, log={log})
    t.suggest_float("lora.lora_alpha/x", 0, dropout + 0.1)
    return dict(model="vit_glyphs_patch4_32", dataset="digits", lora=dict(r=rank,
        lora_dropout=dropout), quantization=dict(mode="nf4", skip_layers=skip))
"""
TUPLES = [(), ("blocks.0.*",), ("blocks.1.*", "blocks.2.*")]


def own(folder, choices=TUPLES, high=0.2, log=False, **options):
    (folder / "own.py").write_text(SPACE.format(choices=choices, high=high, log=log))
    options.setdefault("num_samples", 3)
    return settings(space=f"{folder / 'own.py'}:own", **options)


def test_choices_may_be_tuples_also_when_a_search_goes_on(tmp_path, recwarn):
    study = tmp_path / "study"
    drive(opened(study, own(tmp_path)), stop_after=2)
    search = opened(study, own(tmp_path, num_samples=5))
    drive(search)
    assert len(planned(study)) == 5
    skipped = {trial.quantization.skip_layers for trial in search.trials}
    assert skipped <= set(TUPLES)
    assert len(skipped) > 1
    assert not [w for w in recwarn if "persistent storage" in str(w.message)]
    (study / STORAGE_FILE).unlink()  # learned anew from study.json
    drive(opened(study, own(tmp_path, num_samples=6)))
    assert len(planned(study)) == 6


def test_a_choice_that_cannot_be_kept_is_one_sentence(tmp_path):
    wanted = own(tmp_path, choices="[{1}, {2}]")
    with pytest.raises(UserError, match=r"choice \{1\} of quantization\.skip_layers can't be kept"):
        spaces.probes(wanted)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"choices": TUPLES[:2]}, "quantization.skip_layers"),
        ({"choices": [*TUPLES, ("blocks.3.*",)]}, "quantization.skip_layers"),
        ({"choices": TUPLES[::-1]}, "quantization.skip_layers"),
        ({"high": 0.3}, "lora.lora_dropout"),
        ({"log": True}, "lora.r"),
    ],
)
def test_a_space_that_was_changed_is_refused_before_the_search_goes_on(tmp_path, change, name):
    study = tmp_path / "study"
    drive(opened(study, own(tmp_path)), stop_after=1)
    with pytest.raises(UserError, match=f"{name} is not asked as when this search began") as said:
        opened(study, own(tmp_path, **change))
    assert "choose another --name" in str(said.value)
    assert len(planned(study)) == 1
    drive(opened(study, own(tmp_path)))  # put back, it goes on
    assert len(planned(study)) == 3
