"""The base of our Tune callbacks, and the two that pull and push."""

from __future__ import annotations

from typing import Any

from ray import tune

from tune_study.cluster.stop import Stop
from tune_study.folder.store import Store, plainly


class Callback(tune.Callback):
    """Tune pickles its callbacks for a restore of its own, which we never use: without content."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Pull(Callback):
    """On a cluster: fetches what a trial left before the other callbacks look at it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with plainly():
            self._store.pull(trial.config["trial_id"])

    on_trial_error = on_trial_complete


class Push(Callback):
    """Pushes the study's own files, and what the other callbacks wrote of a trial that ended."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with plainly():
            self._store.push("")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with plainly():
            self._store.push("", f"tensorboard/{trial.config['trial_id']}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not Stop.requested():
            with plainly():
                self._store.push("", trial.config["trial_id"])
