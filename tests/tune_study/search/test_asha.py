"""A search that is pruned, killed and goes on."""

from types import SimpleNamespace

from ray.tune.schedulers import TrialScheduler

from tests.tune_study.search.test_suggestions import opened, settings, states
from tune_study.search import asha
from tune_study.search.search import STORAGE_FILE
from tune_study.search.settings import probes
from tune_study.search.suggestions import Suggestions, tune_config
from tune_study.study import session
from tune_study.study.status import forget, statuses, todo
from tune_study.trial import simulate
from tune_study.trial.context import RunContext, Simulation

ASHA = settings(
    num_samples=10,
    objectives=["val_accuracy"],
    scheduler="asha",
    assignments=[("training.num_train_epochs", 4)],
)


def asha_of(folder, trials, expected):
    """On one machine, where nothing is pulled or pushed."""
    where = RunContext(study_dir=folder, simulation=Simulation())
    nothing = {"pull": lambda trial: None, "push": lambda trial: None}
    return asha.Asha(SimpleNamespace(trials=trials, context=where, expected=expected, **nothing))


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
        fresh = asha_of(tmp_path, search.trials[:number], probes(ASHA))
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
    status = statuses(search.trials, tmp_path)
    assert list(status.values()) == [name.lower().replace("complete", "completed") for name in told]
    assert not todo(search.trials, tmp_path)
    forget(search.trials, tmp_path)  # as --retry-failed does
    assert not todo(search.trials, tmp_path)
    table = session.collect(tmp_path).trials
    assert table.loc[table["status"] == "pruned", "test_accuracy"].isna().all()
    (tmp_path / STORAGE_FILE).unlink()
    rebuilt = Suggestions(opened(tmp_path, ASHA))
    assert states(rebuilt) == told
    assert rebuilt.study.trials[told.index("PRUNED")].last_step == pruned.last_step


def test_a_third_goes_on_at_epochs_1_3_and_9(tmp_path):
    long = settings(objectives=["val_accuracy"], assignments=[("training.num_train_epochs", 12)])
    config = probes(long)[0]
    scheduler = asha_of(tmp_path, [], [probes(ASHA)[0], config])
    assert [milestone for milestone, _ in scheduler._brackets[0]._rungs] == [9, 3, 1]
    found = []
    for seed, accuracy in enumerate((0.5, 0.6, 0.4, 0.55)):
        one = config.model_copy(update={"seed": seed})
        (tmp_path / one.trial_id).mkdir()
        trial = SimpleNamespace(trial_id=str(seed), config={"trial": one.model_dump(mode="json")})
        scheduler.on_trial_add(None, trial)
        row = {"epoch": 1, "val_accuracy": accuracy}
        found.append(scheduler.on_trial_result(None, trial, row))
    assert found == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    last = {"epoch": 12, "val_accuracy": 0.0}
    assert scheduler.on_trial_result(None, trial, last) == "CONTINUE"
