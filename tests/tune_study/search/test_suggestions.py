"""Searches without Ray: spaces, what Optuna is told, and a search that is killed and goes on."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import FixedTrial, TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from search_spaces import optuna_spaces
from tune_study import asha, manifest, run, simulate, space, study
from tune_study.config import UserError, field_names
from tune_study.files import write_json
from tune_study.search import (
    STORAGE_FILE,
    STUDY_NAME,
    Search,
    Suggestions,
    finish,
    outcome,
    tune_config,
)
from tune_study.simulate import Simulation
from tune_study.supervise import Stop
from tune_study.trainable import RunContext


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
    return space.settings(**{**given, **options})


def opened(folder, wanted):
    """The search in ``folder`` as the command line opens it."""
    where = RunContext(study_dir=folder, simulation=Simulation())
    wanted, trials = space.continued(wanted, folder, compute_dtype=None)
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


# ---- spaces and settings


@pytest.mark.parametrize("name", ["qlora", "demo"])
def test_whatever_a_space_answers_is_a_trial(name):
    trials = space.probes(settings(space=name))
    assert len(trials) > 150
    for trial in trials:
        assert trial.lora.lora_alpha % trial.lora.r == 0
        assert trial.quantization.mode != "none" or not trial.quantization.skip_layers
    assert {len(trial.quantization.skip_layers) for trial in trials} == {0, 1}
    assert len({trial.lora.target_modules for trial in trials}) == 4


def test_parameters_are_named_after_the_fields_that_they_fill():
    trial = optuna.create_study().ask()
    optuna_spaces.qlora(trial)
    assert {name.partition("/")[0] for name in trial.params} <= set(field_names())


def test_skip_layers_is_asked_only_where_something_is_quantized():
    answers = {
        "lora.r": 8,
        "lora.lora_alpha/r": 2,
        "lora.lora_dropout": 0.1,
        "lora.target_modules/name": "mlp",
        "training.learning_rate": 1e-3,
        "training.per_device_train_batch_size": 16,
    }
    config = settings().config(FixedTrial({**answers, "quantization.mode": "none"}))
    assert (config.lora.lora_alpha, config.lora.target_modules) == (
        16,
        optuna_spaces.TARGETS["mlp"],
    )
    with pytest.raises(UserError, match="skip_layers"):
        settings().config(FixedTrial({**answers, "quantization.mode": "nf4"}))


def test_what_set_fixes_is_not_asked():
    fixed = [
        ("lora.r", 5),
        ("lora.lora_alpha", 7),
        ("lora.target_modules", "x"),
        ("quantization", "nf4"),
    ]
    trial = optuna.create_study().ask()
    config = settings(assignments=[*fixed, ("training.learning_rate", 0.5)]).config(trial)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.target_modules) == (5, 7, "x")
    assert (config.quantization.mode, config.training.learning_rate) == ("nf4", 0.5)
    assert set(trial.params) == {
        "lora.lora_dropout",
        "quantization.skip_layers/name",
        "training.per_device_train_batch_size",
    }


IMPOSSIBLE = """
def some(trial):
    mode = trial.suggest_categorical("quantization.mode", ["none", "nf4"])
    r = trial.suggest_categorical("lora.r", [4, 2000 if mode == "nf4" else 8])
    return {"model": "vit_glyphs_patch4_32", "dataset": "digits", "lora": {"r": r}}
def text(trial):
    return "nothing"
def dynamic(trial):
    r = trial.suggest_categorical("lora.r", [4, 8])
    return {"model": "m", "dataset": "digits", "lora": {"r": trial.suggest_int("x", 1, r)}}
def broken(trial):
    raise KeyError("here")
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(IMPOSSIBLE)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["tune-study", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run.main()
        output = capsys.readouterr()
        return exit_.value.code, output.out, output.err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--search ax", ["--search ax", "optuna"]),
        ("--space qlora", ["--space", "--search optuna"]),
        ("--num-samples 3 --scheduler asha", ["--num-samples, --scheduler", "--search optuna"]),
        ("--search optuna --space huge", ["--space huge", "qlora"]),
        ("--search optuna --space nowhere.py:f", ["nowhere.py"]),
        ("--search optuna --space my.py:missing", ["my.py:missing", "AttributeError"]),
        ("--search optuna --space my.py:broken", ["my.py:broken", "KeyError"]),
        ("--search optuna --space my.py:text", ["my.py:text", "str"]),
        ("--search optuna --space my.py:some", ["lora.r = 2000", "quantization.mode = nf4"]),
        ("--search optuna --objective loss", ["--objective loss", "weights_bytes"]),
        ("--search optuna --objective test_accuracy", ["test_accuracy", "val_accuracy"]),
        ("--search optuna --objective val_accuracy --objective val_accuracy", ["different"]),
        ("--search optuna --scheduler hyperband", ["hyperband", "asha"]),
        ("--search optuna --scheduler asha", ["val_accuracy and weights_bytes", "alone"]),
        ("--search optuna --objective weights_bytes --scheduler asha", ["weights_bytes", "alone"]),
        ("--search optuna --grid demo", ["--grid demo", "--space"]),
        ("--search optuna --max-experiments 3", ["--max-experiments 3", "--num-samples"]),
        ("--search optuna --dry-run", ["--dry-run", "--validate-only"]),
        ("--search optuna --simulate --objective train_time_s", ["train_time_s", "--simulate"]),
        ("--search optuna --set lora.r=0", ["lora.r = 0"]),
        ("--search optuna --space demo --set quantization.skip_layers=[x]", ["matches no layer"]),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(command, tmp_path, arguments, words):
    code, _, error = command(*arguments.split())
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert [path.name for path in tmp_path.iterdir()] == ["my.py"]


# ---- what Optuna is told


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

    def spoilt(config, simulation, epochs=None):
        content = whole(config, simulation, epochs)
        if config.quantization.mode != "none":
            content["train"]["model_metrics"]["weights_bytes"] = math.nan
        return content

    monkeypatch.setattr(simulate, "results_of", spoilt)
    searcher = drive(opened(tmp_path, settings(num_samples=12)))
    modes = [trial.params["quantization.mode"] for trial in searcher.study.trials]
    assert states(searcher) == ["COMPLETE" if mode == "none" else "FAIL" for mode in modes]
    assert {"COMPLETE", "FAIL"} == set(states(searcher))


# ---- killed and continued


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
    study.forget(search.trials, tmp_path)
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


# ---- ASHA


ASHA = settings(
    num_samples=10,
    objectives=["val_accuracy"],
    scheduler="asha",
    assignments=[("training.num_train_epochs", 4)],
)


def asha_of(folder, trials):
    where = RunContext(study_dir=folder, simulation=Simulation())
    return asha.Asha(trials, where, space.probes(ASHA))


def test_asha_prunes_and_remembers_after_a_kill(tmp_path):
    search = opened(tmp_path, ASHA)
    searcher = Suggestions(search)
    scheduler = tune_config(search, 1)["scheduler"]
    decisions = []
    for number in range(10):
        suggestion = searcher.suggest(f"tune{number}")
        trial = SimpleNamespace(trial_id=f"tune{number}", config=suggestion)
        if number == 5:  # a new process
            scheduler = tune_config(search, 1)["scheduler"]
        fresh = asha_of(tmp_path, search.trials[:number])
        fresh.on_trial_add(None, trial)
        scheduler.on_trial_add(None, trial)
        (tmp_path / search.trials[number].trial_id).mkdir()
        rows, _ = simulate.draw(search.trials[number], Simulation())
        decisions.append("CONTINUE")
        for row in rows:
            searcher.on_trial_result(f"tune{number}", row)
            decision = scheduler.on_trial_result(None, trial, row)
            assert decision == fresh.on_trial_result(None, trial, row)
            if decision == TrialScheduler.STOP:
                decisions[-1] = "STOP"
                break
        else:
            simulate.execute(search.trials[number], Simulation(), tmp_path, lambda row: None)
        scheduler.on_trial_complete(None, trial, row)
        searcher.on_trial_complete(f"tune{number}", row)
    assert {"STOP", "CONTINUE"} == set(decisions)
    told = ["PRUNED" if decision == "STOP" else "COMPLETE" for decision in decisions]
    assert states(searcher) == told
    pruned = searcher.study.trials[told.index("PRUNED")]
    assert pruned.value == pruned.intermediate_values[pruned.last_step]
    status = study.statuses(search.trials, tmp_path)
    assert list(status.values()) == [name.lower().replace("complete", "completed") for name in told]
    assert not study.todo(search.trials, tmp_path)
    assert not study.todo(search.trials, tmp_path, retry_failed=True)
    table = study.collect(tmp_path).trials
    assert table.loc[table["status"] == "pruned", "test_accuracy"].isna().all()
    (tmp_path / STORAGE_FILE).unlink()
    rebuilt = Suggestions(opened(tmp_path, ASHA))
    assert states(rebuilt) == told
    assert rebuilt.study.trials[told.index("PRUNED")].last_step == pruned.last_step


def test_analysis_needs_neither_optuna_nor_ray():
    code = "import sys, analysis.report; print({'optuna', 'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
