"""The one function that Ray calls: where a trial works, and where what it leaves goes.

Here, to a store, or on a cluster's node. What only a trial that trains needs, torch above all, is
imported when one begins: a worker of simulated trials has a sixth of the memory, and is there
sooner.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from search_spaces.own_code import run_where_trials_run
from tune_study.config import TrialConfig
from tune_study.folder.remote import open_remote
from tune_study.folder.store import Store, kept
from tune_study.machine.environment import spare_imports_from_collection
from tune_study.trial import simulate
from tune_study.trial.context import Report, RunContext

if TYPE_CHECKING:
    from tune_study.cluster.inputs import Inputs


def run_trial(
    config: dict[str, Any], context: dict[str, Any], inputs: Inputs | None = None
) -> None:
    """Tune's function trainable. ``config["trial"]`` is a ``TrialConfig`` as a dictionary.

    Of a simulated trial ``config["known"]`` is what ``known_of`` says.
    An exception is written to ``error.json`` and raised again, so that Tune knows of it too.
    ``inputs`` are the data and weights on a cluster.
    """
    trial, where = TrialConfig.model_validate(config["trial"]), RunContext.model_validate(context)
    with at_work(trial, where, inputs, tune.report) as (where, report):
        if where.simulation is not None:
            spare_imports_from_collection()
            simulate.execute(
                trial, where.simulation, where.study_dir, report, where.epoch_s, config["known"]
            )
        else:
            from tune_study.trial.execution import execute

            execute(trial, where, report)


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
            from tune_study.cluster.inputs import receive

            run_where_trials_run(context.code)  # a model of the user's says which images it wants
            context = receive(inputs, trial, context, folder.parent / "weights")
        context.study_dir.mkdir(exist_ok=True)
    store = None
    if context.storage is not None:
        store = Store(open_remote(context.storage), context.study_dir)
        if context.on_cluster:
            store.pull(trial.trial_id)
    with kept(store, trial.trial_id, report) as pushing:
        yield context, pushing
    if context.on_cluster:
        shutil.rmtree(context.study_dir / trial.trial_id)  # the store has it


def node_folder(study: str) -> Path:
    """Where this node's workers keep what they work on, for this run of the study alone.

    By node and not by machine: several nodes can share one.
    """
    where = ray.get_runtime_context()
    name = f"tune-study-{where.get_node_id()[:16]}-{where.get_job_id()}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (os.name != "nt" and folder.stat().st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to someone else")
    return folder / study
