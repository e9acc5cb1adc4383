"""Where a trial works, and where what it leaves goes: here, to a store, on a cluster's node."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tune_study import storage
from tune_study.cluster import node_folder
from tune_study.config import TrialConfig
from tune_study.inputs import Inputs, receive
from tune_study.remote import open_remote
from tune_study.store import Store
from tune_study.trainable import Report, RunContext


@contextmanager
def at_work(
    trial: TrialConfig, context: RunContext, inputs: Inputs | None, report: Report
) -> Iterator[tuple[RunContext, Report]]:
    """The context and the report of ``trial`` on this worker.

    On a cluster it works in a folder of its node, which begins with what the store has of it.
    """
    if context.on_cluster:
        folder = node_folder(context.study_dir.name)
        context = context.model_copy(update={"study_dir": folder})
        if inputs is not None:
            context = receive(inputs, trial, context, folder.parent / "weights")
        context.study_dir.mkdir(exist_ok=True)
    store = None
    if context.storage is not None:
        store = Store(open_remote(context.storage), context.study_dir)
        if context.on_cluster:
            store.pull(trial.trial_id)
    with storage.kept(store, trial.trial_id, report) as pushing:
        yield context, pushing
    if context.on_cluster:
        shutil.rmtree(context.study_dir / trial.trial_id)  # the store has it
