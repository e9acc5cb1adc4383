"""Why a study ends early: a signal, a time limit, a full disk, a lost store."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler


class Stop:
    """Why the study ends early, if it does: the running trials end at their next epoch,

    checkpointed, and none is waited for that starts after that. Of the class, because Tune pickles
    what it is given.
    """

    reason: str | None = None
    """``interrupt`` (Ctrl-C), ``terminate`` (SIGTERM), or a word of ``run.EXIT_STOPPED``."""
    _deadline: float | None = None
    running: set[str] = set()  # noqa: RUF012  (Tune's trial ids)

    @classmethod
    def reset(cls, max_hours: float | None = None) -> None:
        cls.reason, cls.running = None, set()
        cls._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours

    @classmethod
    def request(cls, reason: str) -> None:
        cls.reason = cls.reason or reason

    @classmethod
    def requested(cls) -> bool:
        if cls._deadline is not None and time.monotonic() >= cls._deadline:
            cls.request("time")
        return cls.reason is not None


_SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}


@contextmanager
def graceful_signals(say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the study to stop, the second is a ``KeyboardInterrupt``.

    Comes after ``ray.init``, which takes SIGTERM for itself.
    """

    def handler(signum: int, frame: object) -> None:
        if Stop.reason:
            raise KeyboardInterrupt
        Stop.request(_SIGNALS[signal.Signals(signum)])
        say("stopping after this epoch; Ctrl-C again stops now")

    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class EpochStopper(tune.Stopper):
    """Tune asks it after every report. It has no state of its own, because Tune pickles it."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return Stop.requested()

    def stop_all(self) -> bool:
        return Stop.requested() and not Stop.running


class Gate(FIFOScheduler):
    """First come, first served; starts no trial once the study is to stop."""

    _ended = 0
    """So many trials at the head of Tune's list have ended. Tune's own scheduler looks at them
    again at every step, which takes longer the more there are."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        trials = tune_controller.get_trials()
        while self._ended < len(trials) and trials[self._ended].is_finished():
            self._ended += 1
        if Stop.requested():
            return None
        waiting = (trial for trial in trials[self._ended :] if trial.status == Trial.PENDING)
        return next(waiting, None)
