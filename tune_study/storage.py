"""``--storage URI``: the store holds the truth, and the study is worked on in a local folder.

It is pulled when a run starts and pushed as the run goes on: what an epoch leaves before that
epoch is reported, the study's own files at every trial's start and end. Ray's run folders stay
local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune_study import remote
from tune_study.callback import Callback
from tune_study.lease import lease
from tune_study.remote import RemoteError
from tune_study.results import status_of
from tune_study.schema import FINISHED_STATUSES, GOOD_STATUSES
from tune_study.store import Store, open_store, plainly
from tune_study.supervise import Stop


@contextmanager
def held(
    uri: str | None, folder: Path, say: Callable[[str], None], on_loss: Callable[[], None]
) -> Iterator[Store | None]:
    """The store of this run alone, its study pulled into ``folder``; ``None`` without a URI.

    Raises ``UserError`` for a URI that can't be used, and while another run holds the study.
    ``on_loss`` is called when another run has taken it over (``lease``).
    """
    if uri is None:
        yield None
        return
    store = open_store(uri, folder)
    with plainly(), lease(store.remote, say, on_loss):
        store.pull_study()
        yield store


@contextmanager
def kept(
    store: Store | None, trial_id: str, report: Callable[[dict[str, Any]], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a ``report`` that pushes the trial's folder first; at the end it is pushed again."""
    if store is None:
        yield report
        return

    def push_and_report(row: dict[str, Any]) -> None:
        store.push(trial_id)
        report(row)

    try:
        yield push_and_report
    except RemoteError:
        raise  # there is nothing to push to
    except Exception:
        store.push(trial_id)  # its error.json
        raise
    store.push(trial_id)


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


def push_all(store: Store, trial_ids: Sequence[str]) -> None:
    """At a run's start, when nothing else writes: trials that were forgotten go there as well."""
    with plainly():
        there = {name.partition("/")[0] for name in remote.listing(store.remote)}
        store.push(*(i for i in trial_ids if i in there or (store.folder / i).is_dir()))
        store.push("report", "tensorboard", "")


def push_end(store: Store, trial_ids: Sequence[str]) -> None:
    """At a run's end: tables, report, and what was said of trials that ended badly."""
    with plainly():
        for trial_id in trial_ids:
            status = status_of(store.folder, trial_id)
            if status in FINISHED_STATUSES and status not in GOOD_STATUSES:
                store.push(trial_id)
        store.push("report", "tensorboard", "")
