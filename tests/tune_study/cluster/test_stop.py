"""Why a study stops early: without Ray, whose part tests/e2e plays."""

import signal
import time
from types import SimpleNamespace

import pytest

from tune_study.cluster import stop
from tune_study.cluster.stop import EpochStopper, Gate, Stop


@pytest.fixture(autouse=True)
def _reset():
    yield
    Stop.reset()


class FakeTrial:
    """Tune's, which counts how often it is looked at."""

    def __init__(self, status):
        self.now, self.looked_at = status, 0

    @property
    def status(self):
        self.looked_at += 1
        return self.now

    def is_finished(self):
        return self.status in ("TERMINATED", "ERROR")


def controller_of(trials):
    return SimpleNamespace(get_trials=lambda: trials)


def test_trials_start_in_their_order_and_ended_ones_are_not_looked_at_again():
    gate, trials = Gate(), [FakeTrial("PENDING") for _ in range(4)]
    controller = controller_of(trials)
    assert gate.choose_trial_to_run(controller) is trials[0]
    trials[0].now, trials[1].now = "RUNNING", "ERROR"
    assert gate.choose_trial_to_run(controller) is trials[2]
    trials[0].now = "TERMINATED"
    assert gate.choose_trial_to_run(controller) is trials[2]
    looks = [trial.looked_at for trial in trials[:2]]
    trials.append(FakeTrial("PENDING"))
    assert gate.choose_trial_to_run(controller) is trials[2]
    assert [trial.looked_at for trial in trials[:2]] == looks
    for trial in trials:
        trial.now = "TERMINATED"
    assert gate.choose_trial_to_run(controller) is None


def test_a_stop_waits_for_the_running_trials_and_starts_no_other():
    Stop.reset()
    stopper, gate = EpochStopper(), Gate()
    controller = controller_of([FakeTrial("PENDING")])
    Stop.running.add("t")
    assert not stopper("t", {})
    Stop.request("interrupt")
    assert stopper("t", {})
    assert not stopper.stop_all()
    assert gate.choose_trial_to_run(controller) is None
    Stop.running.clear()
    assert stopper.stop_all()
    Stop.request("disk")
    assert Stop.reason == "interrupt"  # the first reason counts


def test_the_time_limit_is_a_reason_to_stop(monkeypatch):
    Stop.reset(max_hours=1)
    assert not Stop.requested()
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert Stop.requested()
    assert Stop.reason == "time"


def test_hours_are_counted_from_the_reset_to_the_second(monkeypatch):
    now = [500.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    Stop.running.add("of an earlier run")
    Stop.reset(max_hours=0.5)
    assert not Stop.running
    for later, over in ((2299.9, False), (2300.0, True)):
        now[0] = later
        assert Stop.requested() is over
    Stop.reset()
    assert not Stop.requested()


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate")]
)
def test_the_first_signal_asks_and_the_second_stops_now(number, reason):
    Stop.reset()
    said = []
    before = signal.getsignal(number)
    with stop.graceful_signals(said.append):
        signal.raise_signal(number)
        assert Stop.reason == reason
        assert said == ["stopping after this epoch; Ctrl-C again stops now"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before
