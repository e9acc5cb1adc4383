"""``--log mlflow|wandb``: the same trials in a tracker that people already have.

Not through Tune's own MLflow and W&B callbacks. They begin a new run per trial at every start of a
study, write each metric in a transaction of its own, and W&B's hands the key to processes through
Ray. Here a trial has one run, which is found again, and gets each epoch once.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from tune_study.cluster.callbacks import Callback
from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line
from tune_study.folder.files import read_json
from tune_study.folder.results import flatten, measured, read_results
from tune_study.folder.schema import EPOCHS, FINISHED_STATUSES

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

MODULES = {"mlflow": "tune_study.loggers.mlflow", "wandb": "tune_study.loggers.wandb"}
_EPOCH_METRICS = ("best_val_accuracy", *(c.name for c in EPOCHS if c.kind != "str"))


class Tracker(Protocol):
    """One service; ``errors`` is what its calls raise when it can't be reached or says no."""

    name: str
    errors: tuple[type[Exception], ...]

    def status(self, trial_id: str) -> str | None:
        """As recorded at the trial's end, else ``None``."""

    def start(self, trial_id: str, params: Mapping[str, Any]) -> int:
        """Begins the trial's run, or finds it; how many epochs it holds."""

    def epoch(self, trial_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """One epoch, written at once or not at all."""

    def end(self, trial_id: str, status: str, metrics: Mapping[str, float], error: str) -> None:
        """``status`` is one of ours; a trial that is ``interrupted`` goes on later."""

    def close(self) -> None:
        """After the last trial."""


def modules(names: Sequence[str]) -> list[ModuleType]:
    """The trackers' modules. Raises ``UserError`` for a name that is none, or is not installed."""
    found = []
    for name in dict.fromkeys(names):
        if name not in MODULES:
            raise UserError(f"--log {name}: choose one of {', '.join(MODULES)}")
        try:
            found.append(importlib.import_module(MODULES[name]))
        except ModuleNotFoundError as error:
            raise UserError(
                f"--log {name}: the package {error.name} is not installed; "
                f"pip install 'tune-study[{name}]'"
            ) from None
    return found


def opened(
    found: Sequence[ModuleType], study_dir: Path, say: Callable[[str], None]
) -> Trackers | None:
    """Connected to each; raises ``UserError`` for one that can't be reached. ``None`` for none."""
    if not found:
        return None
    created = (read_json(study_dir / "study.json") or {})["created"]
    return Trackers([module.connect(study_dir, created) for module in found], study_dir, say)


def plainly(error: Exception) -> str:
    """An error's first line, without the password of an address."""
    return re.sub(r"//[^/@\s]*@", "//", first_line(error))[:300]


class Trackers(Callback):
    """Tells every tracker what happens. One that fails is left out from then on, and it is said:

    the study goes on, and the next start brings the tracker up to date from the trials' own files.
    """

    def __init__(
        self, trackers: Sequence[Tracker], study_dir: Path, say: Callable[[str], None]
    ) -> None:
        self._trackers = list(trackers)
        self._failed: list[str] = []
        self._study_dir = study_dir
        self._say = say
        self._held: dict[tuple[str, str], int] = {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        trial_id, config = trial.config["trial_id"], trial.config["trial"]
        self._each(lambda tracker: self._start(tracker, trial_id, config))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._each(lambda tracker: self._epoch(tracker, trial.config["trial_id"], result))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._each(lambda tracker: self._end(tracker, trial.config["trial_id"]))

    on_trial_error = on_trial_complete

    def catch_up(self, trials: Sequence[TrialConfig]) -> None:
        """What has ended and is not recorded, after a kill, a lost connection, a late --log."""
        for trial in trials:
            results = read_results(self._study_dir, trial.trial_id)
            if results.get("status") in FINISHED_STATUSES:
                self._each(partial(self._complete, trial, results))

    def close(self, trials: Sequence[TrialConfig]) -> None:
        """At the end of a study, or of this part of it."""
        self.catch_up(trials)
        self._each(lambda tracker: tracker.close())
        for name in self._failed:
            self._say(f"{name}: it misses some of this; the same command brings it up to date")

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except tracker.errors as error:
                self._trackers.remove(tracker)
                self._failed.append(tracker.name)
                self._say(f"{tracker.name}: {plainly(error)}; the study goes on without it")

    def _complete(self, trial: TrialConfig, results: Mapping[str, Any], tracker: Tracker) -> None:
        rows = results["train"].get("epochs") or []
        if tracker.status(trial.trial_id) == results["status"]:
            return
        self._start(tracker, trial.trial_id, trial.model_dump(mode="json"))
        for row in rows:
            self._epoch(tracker, trial.trial_id, row)
        self._end(tracker, trial.trial_id)

    def _start(self, tracker: Tracker, trial_id: str, config: Mapping[str, Any]) -> None:
        params = {name: value for name, value in flatten(config).items() if name != "trial_id"}
        self._held[tracker.name, trial_id] = tracker.start(trial_id, params)

    def _epoch(self, tracker: Tracker, trial_id: str, row: Mapping[str, Any]) -> None:
        epoch = int(row["epoch"])
        if epoch <= self._held[tracker.name, trial_id]:
            return  # a trial that goes on reports its earlier epochs again
        tracker.epoch(trial_id, epoch, _finite({name: row.get(name) for name in _EPOCH_METRICS}))
        self._held[tracker.name, trial_id] = epoch

    def _end(self, tracker: Tracker, trial_id: str) -> None:
        if self._held.pop((tracker.name, trial_id), None) is None:
            return
        results = read_results(self._study_dir, trial_id)
        status = results.get("status")
        if status not in FINISHED_STATUSES:
            tracker.end(trial_id, "interrupted", {}, "")
            return
        final = {f"final/{name}": value for name, value in measured(results).items()}
        tracker.end(trial_id, str(status), _finite(final), results.get("error") or "")


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers alone: what is missing is left out, and never 0."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
