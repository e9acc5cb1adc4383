"""What happens to a study from outside: signals, time limits, dead workers, a dead Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from tune_study.callback import Callback
from tune_study.config import TrialConfig, UserError
from tune_study.files import read_json, write_json
from tune_study.limits import has_room, note_out_of_memory, within_memory
from tune_study.provenance import now
from tune_study.record import write_failure
from tune_study.results import read_results, status_of
from tune_study.schema import FINISHED_STATUSES

RETRIES = 2
"""How often a trial whose worker died is continued within one run."""
_RAY_PROCESSES = ("raylet", "gcs_server")
_LOOK_EVERY_S = 1.0


@contextmanager
def lock(study_dir: Path) -> Iterator[None]:
    """Holds the study folder. Raises ``UserError`` while another run holds it.

    The system lets go of the lock when a run dies, however it dies.
    """
    held, owner = FileLock(study_dir / ".lock"), study_dir / ".run.json"
    try:
        study_dir.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        run = read_json(owner)
        who = f"process {run['pid']} since {run['since']}" if isinstance(run, dict) else "a process"
        raise UserError(
            f"--name {study_dir.name}: {who} is running this study; wait for it, stop it, or "
            "choose another --name"
        ) from None
    except OSError as error:
        raise UserError(
            f"--output-dir {study_dir.parent}: {study_dir} can't be written to ({error.strerror}); "
            "choose another --output-dir or --name"
        ) from None
    try:
        write_json(owner, {"pid": os.getpid(), "since": now()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()


class Stop:
    """Why the study ends early, if it does: the running trials end at their next epoch,

    checkpointed, and no other starts. Of the class, because Tune pickles what it is given.
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


class Deaths(Callback):
    """Tells a worker that died from a trial that failed, and which trials to continue."""

    def __init__(self, study_dir: Path, say: Callable[[str], None]) -> None:
        self._study_dir = study_dir
        self._say = say
        self._count: Counter[str] = Counter()
        self._details: dict[str, str] = {}
        self._kills = out_of_memory_kills()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Stop.running.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Stop.running.discard(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Stop.running.discard(trial.trial_id)
        trial_id = trial.config["trial_id"]
        if status_of(self._study_dir, trial_id) in FINISHED_STATUSES:
            return  # the trial itself has told why
        detail = str(trial.get_error())
        # On a full disk Tune could not write the detail either.
        if "DiskFull" in detail or not has_room(self._study_dir):
            Stop.request("disk")
            return
        if "RemoteError" in detail:
            Stop.request("storage")
            return
        self._count[trial_id] += 1
        self._details[trial_id] = detail
        kills = out_of_memory_kills()
        killed_for_memory, self._kills = kills > self._kills, kills
        cause = "the system killed it for lack of memory" if killed_for_memory else "it was killed"
        if "its node has died" in _in_full(trial):
            cause = "its node died"
        if killed_for_memory:
            self._take_less(trial)
        self._say(f"{trial_id}: its worker process died ({cause})")

    def _take_less(self, trial: Any) -> None:
        folder = self._study_dir / trial.config["trial_id"]
        config = TrialConfig.model_validate(trial.config["trial"])
        micro = within_memory(config, folder).training.per_device_train_batch_size
        note_out_of_memory(folder, micro, "the system killed the worker for lack of memory")

    def to_continue(self, trials: Sequence[TrialConfig]) -> list[TrialConfig]:
        """Trials whose worker died in the last fit; one that dies too often becomes an error."""
        again = []
        for trial in trials:
            if self._details.pop(trial.trial_id, None) is None:
                continue
            if self._count[trial.trial_id] <= RETRIES:
                again.append(trial)
            else:
                _give_up(trial, self._study_dir / trial.trial_id, self._count[trial.trial_id])
        return again


def _in_full(trial: Any) -> str:
    """Ray's own words, of which its error object keeps the first line alone."""
    path = Path(trial.error_file or "")
    return path.read_text(errors="replace") if path.is_file() else ""


def _give_up(trial: TrialConfig, folder: Path, deaths: int) -> None:
    sentence = f"WorkerDied: its worker process was killed {deaths} times in one run"
    results = read_results(folder.parent, folder.name) or {
        "trial_id": trial.trial_id,
        "simulated": False,
        "run": {"config": trial.model_dump(mode="json")},
        "train": {"epochs": []},
        "meta": {},
    }
    epochs = results["train"].get("epochs") or []
    write_failure(folder, trial, "WorkerDied", sentence, len(epochs))
    write_json(folder / "results.json", {**results, "status": "error", "error": sentence})


def out_of_memory_kills() -> int:
    """Processes that the kernel has killed for lack of memory so far; 0 where it does not tell."""
    kills = 0
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue  # another system, or no cgroup v2
        kills += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return kills


class RayWatch:
    """Context: calls ``on_death`` when Ray's own processes die, for then Tune would wait forever.

    Only processes that this one has started are watched, and ``others``.
    """

    def __init__(
        self, on_death: Callable[[str], None], others: Sequence[tuple[str, psutil.Process]] = ()
    ) -> None:
        self._others = others
        self._on_death = on_death
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self._processes: list[tuple[str, psutil.Process]] = []

    def __enter__(self) -> RayWatch:
        children = psutil.Process().children(recursive=True)
        own = [(p.name(), p) for p in children if p.name() in _RAY_PROCESSES]
        self._processes = [*own, *self._others]
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            for name, process in self._processes:
                if not _lives(process) and not self._stop.is_set():
                    self._on_death(name)
                    return


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
