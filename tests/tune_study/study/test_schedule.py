import os
from types import SimpleNamespace

import pytest
from ray import tune

from search_spaces import grids
from tune_study.cluster.connection import Slots
from tune_study.study import plan as plans
from tune_study.study import schedule
from tune_study.trial.context import RunContext


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


@pytest.fixture
def counted():
    """A class of text that counts its copies."""

    class Counted(str):
        copies = 0

        def __deepcopy__(self, memo):
            Counted.copies += 1
            return self

    return Counted


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
