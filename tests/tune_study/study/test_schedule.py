import datetime
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ray import tune

from search_spaces import grids
from tune_study.cluster.connection import Slots
from tune_study.cluster.stop import EpochStopper, Gate, Stop
from tune_study.data.place import Place
from tune_study.study import plan as plans
from tune_study.study import schedule
from tune_study.trial.context import RunContext, Simulation
from tune_study.trial.known import known_of


def test_the_larger_the_study_the_more_seldom_tune_saves_its_state(tmp_path, monkeypatch):
    name = "TUNE_GLOBAL_CHECKPOINT_S"
    monkeypatch.setattr(schedule.tune, "Tuner", lambda *a, **k: SimpleNamespace(fit=lambda: None))
    (trial,) = plans.plan(grids.smoke())[:1]
    context, slots = RunContext(study_dir=tmp_path), Slots({"CPU": 1}, 1)
    monkeypatch.setenv(name, "7")
    for count, set_by_user, period in ((12, False, 30), (14_400, False, 1440), (12, True, 7)):
        if not set_by_user:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, "7")
        schedule._fit([trial] * count, context, lambda config: None, [], slots, None)
        assert float(os.environ[name]) == period


def test_a_studys_ids_are_not_copied_for_each_trial(counted):
    """Of a grid of ids Tune would copy all 30 for each of 30 trials, before the first begins."""
    trials = [SimpleNamespace(trial_id=counted(f"trial-{number}")) for number in range(30)]
    plan = schedule._in_order(trials, 2)
    generator = plan["search_alg"]
    space = {"trial_id": "", "trial": {}}
    generator.add_configurations(
        tune.Experiment("run", lambda config: None, config=space, num_samples=plan["num_samples"])
    )
    order = []
    while True:
        started = [generator.next_trial() for _ in range(3)]
        assert started[-1] is None  # at most two at a time
        running = [trial for trial in started if trial]
        if not running:
            break
        order += [trial.config["trial_id"] for trial in running]
        for trial in running:
            generator.on_trial_complete(trial.trial_id)
    assert generator.is_finished()
    assert order == [trial.trial_id for trial in trials]
    assert counted.copies <= 3 * 30


@pytest.fixture
def tuned(monkeypatch):
    """What ``_fit`` gives the Tuner, which does nothing."""
    seen = {}

    def tuner(trainable, **options):
        seen.update(options, trainable=trainable, fits=0)

        def fit():
            seen["fits"] += 1

        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(schedule.tune, "Tuner", tuner)
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "30")
    return seen


def test_a_tuner_names_trials_and_folders_by_our_ids_and_reuses_its_workers(tmp_path, tuned):
    trials = plans.plan(grids.smoke())[:3]
    callbacks = [tune.Callback()]
    slots = Slots({"CPU": 3, "GPU": 0.5}, 2)
    context = RunContext(study_dir=tmp_path)
    schedule._fit(trials, context, lambda config: None, callbacks, slots, None)
    assert tuned["fits"] == 1
    config, run = tuned["tune_config"], tuned["run_config"]
    assert config.reuse_actors is True
    assert config.num_samples == 3
    assert isinstance(config.scheduler, Gate)
    named = SimpleNamespace(config={"trial_id": "ours"}, trial_id="tunes")
    assert config.trial_name_creator(named) == config.trial_dirname_creator(named) == "ours"
    assert (run.storage_path, run.verbose, run.callbacks) == (str(tmp_path), 0, callbacks)
    assert run.name.startswith("run-")
    assert isinstance(run.stop, EpochStopper)
    assert tuned["trainable"]._resources.bundles == [{"CPU": 3, "GPU": 0.5}]
    spec = {"config": {"trial_id": trials[1].trial_id}}
    assert tuned["param_space"]["trial"].func(spec) == trials[1].model_dump(mode="json")
    assert tuned["param_space"].keys() == {"trial_id", "trial"}


def test_a_simulated_trial_is_told_what_would_take_torch_to_know(tmp_path, tuned):
    trials = plans.plan(grids.smoke())[:2]
    context = RunContext(study_dir=tmp_path, simulation=Simulation())
    slots = Slots({"CPU": 1}, 1)
    schedule._fit(trials, context, lambda config: None, [], slots, None)
    spec = {"config": {"trial_id": trials[1].trial_id}}
    assert tuned["param_space"]["known"].func(spec) == known_of(trials[1])
    assert known_of(trials[1]) != known_of(trials[0])


def test_without_a_limit_tune_creates_all_trials_at_once():
    trials = [SimpleNamespace(trial_id=name) for name in "abc"]
    generator = schedule._in_order(trials, None)["search_alg"]
    generator.add_configurations(
        tune.Experiment("run", lambda config: None, config={"trial_id": ""}, num_samples=3)
    )
    assert [generator.next_trial().config["trial_id"] for _ in range(3)] == list("abc")


def test_callbacks_pull_first_and_push_last(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "_tensorboard", lambda context, search: ["board"])
    here, there = (RunContext(study_dir=tmp_path, on_cluster=on) for on in (False, True))
    store = object()

    def kinds(context, store):
        found = schedule._callbacks(context, None, ["ours"], store)
        return [one if isinstance(one, str) else type(one).__name__ for one in found]

    assert kinds(here, None) == ["board", "ours"]
    assert kinds(there, None) == ["board", "ours"]
    assert kinds(here, store) == ["board", "ours", "Push"]
    assert kinds(there, store) == ["Pull", "board", "ours", "Push"]


def test_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 5, 7, 8, 9)

    monkeypatch.setattr(schedule.datetime, "datetime", Clock)
    names = []
    for _ in range(3):
        names.append(schedule._new_run(tmp_path))
        (tmp_path / names[-1]).mkdir()
    stamp = "run-20261105-070809"
    assert names == [stamp, f"{stamp}-2", f"{stamp}-3"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(fits, **options)`` -> (the trials of each Tuner, the callbacks, what was called)."""
    calls = []
    monkeypatch.setattr(
        schedule.connection,
        "connect",
        lambda address, context, **options: (
            calls.append((address, options)) or Slots({"CPU": 1}, 2, "where they run", on_device=2)
        ),
    )
    monkeypatch.setattr(schedule.ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(schedule, "own_raylet", lambda: calls.append("raylet") or ["r"])
    monkeypatch.setattr(schedule, "ship", lambda trials, context: "inputs")
    monkeypatch.setattr(schedule, "fill", lambda *given: calls.append(given[:-1]))
    monkeypatch.setattr(schedule, "RayWatch", lambda *given: calls.append(given) or nullcontext())
    monkeypatch.setattr(schedule, "graceful_signals", lambda say: nullcontext())
    monkeypatch.setattr(schedule, "_callbacks", lambda context, search, ours, store: ours)
    monkeypatch.setattr(
        schedule.tune, "with_parameters", lambda function, **given: calls.append(given)
    )

    def call(deaths, on_cluster=False, stop=False, simulation=None, **options):
        Stop.reset()
        fitted, seen = [], []
        again = iter(deaths)

        def fit(trials, context, trainable, callbacks, slots, search):
            fitted.append(list(trials))
            seen.append(callbacks)
            if stop:
                Stop.request("interrupt")

        monkeypatch.setattr(schedule, "_fit", fit)
        monkeypatch.setattr(schedule.Deaths, "to_continue", lambda self, trials: next(again))
        context = RunContext(study_dir=tmp_path, on_cluster=on_cluster, simulation=simulation)
        progress = SimpleNamespace(say=print)
        schedule.run(["a", "b"], context, progress, on_dead_ray=print, **options)
        Stop.reset()
        return fitted, seen, progress, calls

    return call


def test_dead_trials_run_again_until_none_is_left(run):
    fitted, callbacks, progress, calls = run([["b"], []], trackers="trackers")
    assert fitted == [["a", "b"], ["b"]]
    assert callbacks[0][0] is progress
    assert callbacks[0][2:] == ["trackers"]
    assert calls[0] == (
        "local",
        {"max_concurrent": None, "gpus_per_trial": None, "dashboard": False},
    )
    assert calls[1]["inputs"] is None
    assert calls[1]["context"]["trials_on_device"] == 2
    assert calls[2:] == [(print, []), "shutdown"]


def test_a_stop_runs_nothing_again(run):
    assert run([["b"]], stop=True)[0] == [["a", "b"]]


def test_on_a_cluster_inputs_are_shipped_and_its_raylet_is_watched(run, capsys):
    options = {"max_concurrent": 3, "gpus_per_trial": 0.5, "dashboard": True}
    _, callbacks, _, calls = run([[]], on_cluster=True, address="auto", **options)
    assert len(callbacks[0]) == 2
    assert calls[0] == ("auto", options)
    assert calls[1] == "raylet"
    assert calls[2]["inputs"] == "inputs"
    filled = ("inputs", Place(), {"CPU": 1}, "auto")
    assert calls[3:] == [(print, ["r"]), filled, "shutdown"]
    assert capsys.readouterr().out == "where they run\n"


def test_simulated_trials_are_shipped_nothing_which_would_load_torch(run):
    calls = run([[]], on_cluster=True, simulation=Simulation())[3]
    assert calls[2]["inputs"] is None
    assert calls[3:] == [(print, ["r"]), "shutdown"]
