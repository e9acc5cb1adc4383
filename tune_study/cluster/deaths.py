"""Who died: a trial's worker, its node, or Ray itself."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from tune_study.cluster.callbacks import Callback
from tune_study.cluster.stop import Stop
from tune_study.config import TrialConfig
from tune_study.folder.files import write_json
from tune_study.folder.results import read_results, status_of
from tune_study.folder.schema import FINISHED_STATUSES
from tune_study.machine.disk import has_room
from tune_study.machine.resources import out_of_memory_kills
from tune_study.trial.micro_batch import note_out_of_memory, within_memory
from tune_study.trial.record import write_failure

RETRIES = 2
"""How often a trial whose worker died is continued within one run."""
_RAY_PROCESSES = ("raylet", "gcs_server")
_LOOK_EVERY_S = 1.0


class Deaths(Callback):
    """Tells a worker that died from a trial that failed, and which trials to continue."""

    def __init__(self, study_dir: Path, say: Callable[[str], None]) -> None:
        self._study_dir = study_dir
        self._say = say
        self._count: Counter[str] = Counter()
        self._details: dict[str, str] = {}
        """Why a node could not begin a trial; "" of one whose worker died."""
        self._kills = out_of_memory_kills()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Once it is to stop, Tune still gives the worker of one that ended to one that waits.
        if not Stop.requested():
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
        told = re.search(r"^\S*\bUserError: (.+)", _in_full(trial), re.MULTILINE)
        self._details[trial_id] = told[1] if told else ""
        if told:
            self._say(f"{trial_id}: its node could not begin it ({told[1]})")
            return
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
            told = self._details.pop(trial.trial_id, None)
            if told is None:
                continue
            if (count := self._count[trial.trial_id]) <= RETRIES:
                again.append(trial)
                continue
            killed = f"its worker process was killed {count} times in one run"
            kind = "UserError" if told else "WorkerDied"
            _give_up(trial, self._study_dir / trial.trial_id, kind, told or killed)
        return again


def _in_full(trial: Any) -> str:
    """Ray's own words, of which its error object keeps the first line alone."""
    path = Path(trial.error_file or "")
    return path.read_text(errors="replace") if path.is_file() else ""


def _give_up(trial: TrialConfig, folder: Path, kind: str, why: str) -> None:
    sentence = f"{kind}: {why}"
    results = read_results(folder.parent, folder.name) or {
        "trial_id": trial.trial_id,
        "simulated": False,
        "run": {"config": trial.model_dump(mode="json")},
        "train": {"epochs": []},
        "meta": {},
    }
    epochs = results["train"].get("epochs") or []
    write_failure(folder, trial, kind, sentence, len(epochs))
    write_json(folder / "results.json", {**results, "status": "error", "error": sentence})


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


def own_raylet() -> list[tuple[str, psutil.Process]]:
    """The raylet of this machine that this process talks to, when it has not started it."""
    node = ray._private.worker.global_worker.node
    assert node is not None  # connected
    # The whole argument: on one machine a second raylet's socket is the first one's and a suffix.
    socket = f"--raylet_socket_name={node.raylet_socket_name}"
    return [
        ("raylet", process)
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet" and socket in (process.info["cmdline"] or [])
    ]
