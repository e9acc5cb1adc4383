"""Plan, run, restore, collect. Ray schedules; the files of ours are the truth."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.variant_generator import generate_variants

from analysis.load import Study, rebuild, write_tables
from search_spaces import grids
from search_spaces.lookup import function_of
from tune_study import cluster
from tune_study.config import TrialConfig, UserError, assign, parse_trial
from tune_study.hparams import axes_of
from tune_study.inputs import ship
from tune_study.mode_curves import ModeCurves, write_study_run
from tune_study.progress import Progress
from tune_study.results import status_of
from tune_study.schema import FINISHED_STATUSES, PLANNED_ENDS
from tune_study.storage import Pull, Push
from tune_study.store import Store
from tune_study.supervise import Deaths, EpochStopper, Gate, RayWatch, Stop, graceful_signals
from tune_study.tensorboard import TensorBoardCallback
from tune_study.trainable import RunContext, run_trial

if TYPE_CHECKING:  # Optuna and its SQLite are loaded for a search alone
    from tune_study.search import Search

MOST_TRIALS = 100_000
with contextlib.suppress(ImportError):  # private to Ray: may go
    from ray.air._internal import usage

    # For its usage statistics, which are off, Tune would import MLflow and W&B where they are
    # installed, in order to count them among the callbacks.
    usage.tag_callbacks = lambda callbacks: False


def load_grid(grid: str) -> tuple[str, dict[str, Any]]:
    """(name, param_space) of a built-in grid, or of ``path/to/file.py:function``.

    Raises ``UserError``.
    """
    name, function = function_of("--grid", grid, grids)
    try:
        space = function()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"--grid {grid}: {type(error).__name__}: {error}") from error
    if not isinstance(space, dict):
        raise UserError(f"--grid {grid}: it returned {type(space).__name__}, not a param_space")
    return name, space


def plan(
    param_space: Mapping[str, Any], assignments: Sequence[tuple[str, Any]] = ()
) -> list[TrialConfig]:
    """The trials of a grid: seed by seed, and within a configuration mode by mode.

    So a study that stops early has compared all modes on what it has seen. ``assignments`` replace
    single fields, and with them the axes of the grid that they name; cells that become equal are
    one trial. Raises ``UserError`` for a field or value that is not allowed.
    """
    try:
        if (count := _cells(param_space)) > MOST_TRIALS:
            raise UserError(f"--grid: it has {count:,} cells, {MOST_TRIALS:,} are allowed")
        variants = [spec for _, spec in generate_variants({"config": _uncopied(param_space)})]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--grid: {error}") from None
    trials: dict[str, TrialConfig] = {}
    for variant in variants:
        values = variant["config"]
        for key, value in assignments:
            values = assign(values, key, value)
        trial = parse_trial(values)
        trials.setdefault(trial.trial_id, trial)
    seeds = _ranks(trial.seed for trial in trials.values())
    groups = _ranks(trial.configuration for trial in trials.values())
    return sorted(trials.values(), key=lambda t: (seeds[t.seed], groups[t.configuration]))


class _Uncopied(list[Any]):
    """A grid's values. Tune copies the whole grid for each of its cells: the more values there are,
    the longer each cell would take.
    """

    def __deepcopy__(self, memo: object) -> _Uncopied:
        return self


def _uncopied(space: Any) -> Any:
    if _is_alone(space, "grid_search"):
        return {"grid_search": _Uncopied(map(_uncopied, space["grid_search"]))}
    if isinstance(space, Mapping):
        return {key: _uncopied(value) for key, value in space.items()}
    return [_uncopied(value) for value in space] if isinstance(space, list) else space


def _ranks(values: Iterable[Any]) -> dict[Any, int]:
    """Where each value comes first, among the different ones."""
    return {value: rank for rank, value in enumerate(dict.fromkeys(values))}


def _cells(space: Any) -> int:
    """How many cells a grid has. Raises ``UserError`` for what Tune would draw or stumble over."""
    if isinstance(space, tune.search.sample.Domain) or _is_alone(space, "eval"):
        raise UserError(
            "--grid: it draws values (tune.choice, tune.uniform, ...); a grid names them, with "
            "tune.grid_search"
        )
    if _is_alone(space, "grid_search"):
        values = space["grid_search"]
        if not isinstance(values, list) or not values:
            raise UserError("--grid: tune.grid_search wants a list with at least one value")
        return sum(_cells(value) for value in values)
    if isinstance(space, Mapping):
        if not all(isinstance(key, str) for key in space):
            raise UserError("--grid: the names in a param_space must be text")
        space = list(space.values())
    return math.prod(_cells(value) for value in space) if isinstance(space, list | tuple) else 1


def _is_alone(space: Any, key: str) -> bool:
    return isinstance(space, Mapping) and list(space) == [key]


def statuses(trials: Iterable[TrialConfig], study_dir: Path) -> dict[str, str]:
    """{trial_id: status}, by our own files alone."""
    return {trial.trial_id: status_of(study_dir, trial.trial_id) for trial in trials}


def todo(
    trials: Sequence[TrialConfig], study_dir: Path, *, retry_failed: bool = False
) -> list[TrialConfig]:
    """The trials that are still to be run, or to be continued."""
    done = PLANNED_ENDS if retry_failed else FINISHED_STATUSES
    found = statuses(trials, study_dir)
    return [trial for trial in trials if found[trial.trial_id] not in done]


def forget(trials: Iterable[TrialConfig], study_dir: Path) -> None:
    """Removes what failed trials left, so that they start from the beginning."""
    found = statuses(trials, study_dir)
    for trial_id, status in found.items():
        if status in FINISHED_STATUSES and status not in PLANNED_ENDS:
            for folder in [study_dir / trial_id, *study_dir.glob(f"run-*/{trial_id}")]:
                shutil.rmtree(folder, ignore_errors=True)


def run(
    trials: Sequence[TrialConfig],
    context: RunContext,
    progress: Progress,
    *,
    on_dead_ray: Callable[[str], None],
    address: str = "local",
    max_concurrent: int | None = None,
    gpus_per_trial: float | None = None,
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
    slots = cluster.connect(
        address,
        context,
        max_concurrent=max_concurrent,
        gpus_per_trial=gpus_per_trial,
        dashboard=dashboard,
    )
    deaths = Deaths(context.study_dir, progress.say)
    ours = [progress, deaths, *([trackers] if trackers else [])]
    others = cluster.own_raylet() if context.on_cluster else []
    try:
        trainable = tune.with_parameters(
            run_trial,
            context=context.model_dump(mode="json"),
            inputs=ship(trials, context) if context.on_cluster else None,
        )
        with graceful_signals(progress.say), RayWatch(on_dead_ray, others):
            if search:
                search.begin(progress)
            waiting = list(trials)
            while (waiting or search) and not Stop.requested():
                callbacks = _callbacks(context, search, ours, store)
                _fit(waiting, context, trainable, callbacks, slots, search)
                waiting = deaths.to_continue(search.trials if search else waiting)
                if not waiting:
                    break
            if search:
                from tune_study.search import finish

                finish(search)
    finally:
        ray.shutdown()


def _callbacks(
    context: RunContext, search: Search | None, ours: Sequence[tune.Callback], store: Store | None
) -> list[tune.Callback]:
    """In the order in which they need each other's files."""
    return [
        *([Pull(store)] if store and context.on_cluster else []),
        *_tensorboard(context, search),
        *ours,
        *([Push(store)] if store else []),
    ]


def _fit(
    trials: Sequence[TrialConfig],
    context: RunContext,
    trainable: Callable[..., Any],
    callbacks: list[tune.Callback],
    slots: cluster.Slots,
    search: Search | None,
) -> None:
    """One Tuner, in a new run folder of the study."""
    # Tune's snapshot of its state copies what it knows of all trials: the more, the more seldom.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(max(30, len(trials) / 10)))
    if search:
        from tune_study.search import tune_config

        plan = tune_config(search, slots.at_a_time)
    else:
        plan = _in_order(trials, slots.limit)
    cells = {trial.trial_id: trial.model_dump(mode="json") for trial in trials}
    cell = tune.sample_from(lambda spec: cells[spec["config"]["trial_id"]])
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([slots.resources])),
        param_space={} if search else {"trial_id": "", "trial": cell},
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
    plan = _plan_of(context)
    return [
        TensorBoardCallback(context.study_dir, axes_of(plan)),
        ModeCurves(context.study_dir, plan),
    ]


def _plan_of(context: RunContext) -> list[dict[str, Any]]:
    """The whole plan, of which this run may be a part."""
    return json.loads((context.study_dir / "study.json").read_text())["plan"]


def _new_run(study_dir: Path) -> str:
    stamp = datetime.datetime.now().strftime("run-%Y%m%d-%H%M%S")
    name, count = stamp, 1
    while (study_dir / name).exists():
        count += 1
        name = f"{stamp}-{count}"
    return name


def collect(study_dir: Path) -> Study:
    """The tables of the study, from the trials' own files, written beside them."""
    study = rebuild(study_dir)
    write_tables(study, study_dir)
    return study
