"""One start of Ray Tune: the Tuner, its callbacks in their order, what dies and goes on."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from tune_study.cluster import connection
from tune_study.cluster.callbacks import Pull, Push
from tune_study.cluster.deaths import Deaths, RayWatch, own_raylet
from tune_study.cluster.filling import fill
from tune_study.cluster.inputs import ship
from tune_study.cluster.stop import EpochStopper, Gate, Stop, graceful_signals
from tune_study.cluster.trainable import run_trial
from tune_study.config import TrialConfig
from tune_study.folder.store import Store
from tune_study.loggers.hparams import axes_of
from tune_study.loggers.mode_curves import ModeCurves, write_study_run
from tune_study.loggers.progress import Progress
from tune_study.loggers.tensorboard import TensorBoardCallback
from tune_study.machine.gpus import Need
from tune_study.study.manifest import plan_of
from tune_study.trial.context import RunContext
from tune_study.trial.known import known_of

if TYPE_CHECKING:  # Optuna and its SQLite are loaded for a search alone
    from tune_study.search.search import Search
with contextlib.suppress(ImportError):  # private to Ray: may go
    from ray.air._internal import usage

    # For its usage statistics, which are off, Tune would import MLflow and W&B where they are
    # installed, in order to count them among the callbacks.
    usage.tag_callbacks = lambda callbacks: False


def run(
    trials: Sequence[TrialConfig],
    context: RunContext,
    progress: Progress,
    *,
    on_dead_ray: Callable[[str], None],
    address: str = "local",
    max_concurrent: int | None = None,
    gpus_per_trial: float | Need | None = None,
    dashboard: bool = False,
    search: Search | None = None,
    store: Store | None = None,
    trackers: tune.Callback | None = None,
) -> None:
    """Runs ``trials`` with Ray Tune, and continues those whose worker or node died.

    A ``search`` is asked for the trials instead, until it has no more.

    Each trial continues from its own newest checkpoint, so nothing of an earlier run's Tune state
    is needed, and nothing of it is unpickled.
    """
    slots = connection.connect(
        address,
        context,
        max_concurrent=max_concurrent,
        gpus_per_trial=gpus_per_trial,
        dashboard=dashboard,
    )
    context = context.model_copy(update={"trials_on_device": slots.on_device})
    if slots.told:
        progress.say(slots.told)
    deaths = Deaths(context.study_dir, progress.say)
    ours = [progress, deaths, *([trackers] if trackers else [])]
    others = own_raylet() if context.on_cluster else []
    try:
        needed = search.expected if search else trials
        trains = context.simulation is None
        inputs = ship(needed, context) if context.on_cluster and trains else None
        trainable = tune.with_parameters(
            run_trial, context=context.model_dump(mode="json"), inputs=inputs
        )
        with graceful_signals(progress.say), RayWatch(on_dead_ray, others):
            if inputs:
                fill(inputs, context.place, slots.resources, address, progress.say)
            if search:
                search.begin(progress, store)
            waiting = list(trials)
            while (waiting or search) and not Stop.requested():
                callbacks = _callbacks(context, search, ours, store)
                _fit(waiting, context, trainable, callbacks, slots, search)
                waiting = deaths.to_continue(search.trials if search else waiting)
                if not waiting:
                    break
            if search:
                from tune_study.search.suggestions import finish

                finish(search)
    finally:
        ray.shutdown()


def _callbacks(
    context: RunContext, search: Search | None, ours: Sequence[tune.Callback], store: Store | None
) -> list[tune.Callback]:
    """In the order in which they need each other's files. A search pulls by itself, earlier."""
    return [
        *([Pull(store)] if store and context.on_cluster and not search else []),
        *_tensorboard(context, search),
        *ours,
        *([Push(store)] if store else []),
    ]


def _fit(
    trials: Sequence[TrialConfig],
    context: RunContext,
    trainable: Callable[..., Any],
    callbacks: list[tune.Callback],
    slots: connection.Slots,
    search: Search | None,
) -> None:
    """One Tuner, in a new run folder of the study."""
    # Tune's snapshot of its state copies what it knows of all trials: the more, the more seldom.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(max(30, len(trials) / 10)))
    if search:
        from tune_study.search.suggestions import tune_config

        plan = tune_config(search, slots.at_a_time)
    else:
        plan = _in_order(trials, slots.limit)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([slots.resources])),
        param_space={} if search else _space(trials, context),
        tune_config=tune.TuneConfig(
            **plan,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=_new_run(context.study_dir),
            storage_path=str(context.study_dir),
            stop=EpochStopper(),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    tuner.fit()


def _space(trials: Sequence[TrialConfig], context: RunContext) -> dict[str, Any]:
    """What a worker is given of a trial whose id Tune knows: ``run_trial``'s ``config``."""
    by_id = {trial.trial_id: trial for trial in trials}

    def told(of: Callable[[TrialConfig], dict[str, Any]]) -> Any:
        return tune.sample_from(lambda spec: of(by_id[spec["config"]["trial_id"]]))

    space = {"trial_id": "", "trial": told(lambda trial: trial.model_dump(mode="json"))}
    return space if context.simulation is None else {**space, "known": told(known_of)}


def _in_order(trials: Sequence[TrialConfig], at_a_time: int | None) -> dict[str, Any]:
    """What Tune's ``TuneConfig`` gets for trials that are known.

    Not ``tune.grid_search``: Tune copies all ids for each of them, and begins when it is done.
    """
    ids = [{"trial_id": trial.trial_id} for trial in trials]
    return {
        "search_alg": BasicVariantGenerator(ids, max_concurrent=at_a_time or 0),
        "num_samples": len(ids),
        "scheduler": Gate(),
    }


def _tensorboard(context: RunContext, search: Search | None) -> list[tune.Callback]:
    """A search draws from ranges and compares no modes: it lists no values and has no curves."""
    if search:
        axes = axes_of(search.drawn(), listed=False)
        write_study_run(context.study_dir, axes)
        return [TensorBoardCallback(context.study_dir, axes)]
    plan = plan_of(context.study_dir)  # of which this run may be a part
    return [
        TensorBoardCallback(context.study_dir, axes_of(plan)),
        ModeCurves(context.study_dir, plan),
    ]


def _new_run(study_dir: Path) -> str:
    stamp = datetime.datetime.now().strftime("run-%Y%m%d-%H%M%S")
    name, count = stamp, 1
    while (study_dir / name).exists():
        count += 1
        name = f"{stamp}-{count}"
    return name
