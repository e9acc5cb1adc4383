"""What is pulled and pushed when, of a trial that starts, ends or fails."""

from types import SimpleNamespace

import pytest

from tune_study.cluster.callbacks import Pull, Push
from tune_study.cluster.stop import Stop

TRIAL = SimpleNamespace(config={"trial_id": "one"})


@pytest.fixture
def store():
    Stop.reset()
    calls = []
    yield SimpleNamespace(
        pull=lambda *names: calls.append(("pull", *names)),
        push=lambda *names: calls.append(("push", *names)),
        calls=calls,
    )
    Stop.reset()


def test_what_a_trial_left_is_pulled_however_it_ended(store):
    callback = Pull(store)
    callback.on_trial_start(0, [], TRIAL)
    assert store.calls == []
    callback.on_trial_complete(0, [], TRIAL)
    callback.on_trial_error(0, [], TRIAL)
    assert store.calls == [("pull", "one")] * 2
    assert Push(store).__getstate__() == {}


def test_the_studys_files_are_pushed_at_a_start_and_with_what_a_trial_left(store):
    callback = Push(store)
    callback.on_trial_start(0, [], TRIAL)
    callback.on_trial_complete(0, [], TRIAL)
    callback.on_trial_error(0, [], TRIAL)
    Stop.request("storage")
    callback.on_trial_error(0, [], TRIAL)  # the store may be what is lost
    assert store.calls == [("push", ""), ("push", "", "tensorboard/one"), ("push", "", "one")]
