"""What ``tune_study.run`` does, once its options are in order: plan, check, run, report."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from tune_study import batch as batches
from tune_study import manifest, preflight, trackers
from tune_study import space as spaces
from tune_study import study as studies
from tune_study.cluster import check_options
from tune_study.config import TrialConfig, UserError
from tune_study.dry_run import print_plan
from tune_study.estimate import settle_compute_dtype
from tune_study.extension import NEW, Extension, held_against
from tune_study.limits import disk_full, refuse_full_disk
from tune_study.options import EXIT_FAILED, EXIT_STOPPED, Options, resolved, safe_name
from tune_study.preflight import Checked
from tune_study.progress import Progress
from tune_study.provenance import cores
from tune_study.remote import masked
from tune_study.schema import PLANNED_ENDS
from tune_study.simulate import Simulation, parse_effect
from tune_study.space import Settings
from tune_study.storage import held, push_all, push_end
from tune_study.store import place_of
from tune_study.supervise import Stop, lock
from tune_study.trackers import Trackers
from tune_study.trainable import RunContext


def execute(given: Options) -> int:
    """Runs the command and returns its exit code. Raises ``UserError``."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    tracker_modules = trackers.modules(given.log or [])
    settings, grid_name, trials = trials_of(given)
    simulation = _simulation(given)
    context = _context(given, grid_name, simulation)
    study_dir = context.study_dir
    auto = batches.wanted(
        given.batch,
        context,
        search=given.search,
        max_concurrent=given.max_concurrent,
        gpus_per_trial=given.gpus_per_trial,
    )
    with ExitStack() as holds:
        store = None
        if given.works and context.storage:  # what is there decides what follows
            holds.enter_context(lock(study_dir))
            store = holds.enter_context(
                held(context.storage, study_dir, console.print, lambda: Stop.request("lease"))
            )
        if given.resume and not (study_dir / "study.json").is_file():
            raise UserError(
                f"--resume: there is no study in {study_dir}; leave it out to begin one"
            )
        drawn = trials
        if not simulation:
            trials = with_compute_dtype(console, trials, context)
        say_what_is_unusual(console, trials, simulation)
        checked = preflight.check(trials, context, auto_batch=auto)
        choices = batches.known(trials, study_dir, auto=auto)
        say_long_warm_up(console, trials, checked)
        if given.dry_run:
            notes = manifest.review(trials, context, checked.checksums).notes
            extension = extension_of(trials, context, given.retry_failed)
            if auto and len(choices) < len(trials):
                notes = [*notes, batches.NOT_YET]
            print_plan(console, trials, checked, context, extension, notes)
            return 0
        if given.validate_only:
            preflight.validate(trials, checked, context)
            console.print(f"{len(trials)}/{len(trials)} valid")
            return 0
        command = masked(shlex.join(["python", "-m", "tune_study.run", *sys.argv[1:]]))
        refuse_full_disk(study_dir)
        if store is None:
            holds.enter_context(lock(study_dir))
        if settings:
            settled = "fp32" if trials != drawn else None
            settings, trials = spaces.continued(settings, study_dir, compute_dtype=settled)
        extension = None if settings else extension_of(trials, context, given.retry_failed)
        for note in manifest.open_study(
            trials,
            context,
            checked.checksums,
            grid=settings.space if settings else given.grid or "demo",
            command=command,
            search=settings.record() if settings else None,
        ):
            console.print(f"note: {note}")
        if extension and (extension.others or NEW in extension.states.values()):
            console.print(f"extending {study_dir.name}: {extension.sentence}")
        logged = trackers.opened(
            tracker_modules, study_dir, lambda line: console.print(line, markup=False)
        )
        if given.retry_failed:
            studies.forget(trials, study_dir)
        batches.choose(trials, context, choices, console.print, auto=auto)
        if store:
            push_all(store, [trial.trial_id for trial in trials])
        options: dict[str, Any] = {
            "address": given.address,
            "max_concurrent": given.max_concurrent,
            "gpus_per_trial": given.gpus_per_trial,
            "dashboard": given.dashboard,
            "store": store,
        }
        if settings:
            from tune_study.search import Search

            options["search"] = Search(settings, context, trials)
        return _run(console, trials, context, options, command, given.max_hours, logged)


def trials_of(given: Options) -> tuple[Settings | None, str, list[TrialConfig]]:
    """(what a search draws, or ``None`` for a grid; the grid's or space's name; the trials).

    Of a search the trials are the largest that it can draw. Raises ``UserError``.
    """
    assignments = given.assignments
    settings = spaces.settings(
        search=given.search,
        space=given.space,
        num_samples=given.num_samples,
        objectives=given.objective,
        scheduler=given.scheduler,
        seed=given.search_seed,
        assignments=assignments,
    )
    if settings:
        spaces.refuse_grid_options(
            settings, given.grid, given.max_experiments, given.dry_run, given.simulate
        )
        return settings, settings.name, spaces.largest(spaces.probes(settings))
    name, param_space = studies.load_grid(given.grid or "demo")
    return None, name, studies.plan(param_space, assignments)[: given.max_experiments]


def _simulation(given: Options) -> Simulation | None:
    if given.simulate:
        sd = {} if given.seed_sd is None else {"seed_sd": given.seed_sd}
        return Simulation(effects=dict(map(parse_effect, given.effect or [])), **sd)
    if given.effect or given.seed_sd is not None:
        raise UserError("--effect and --seed-sd belong to --simulate; add it, or leave them out")
    return None


def _context(given: Options, grid_name: str, simulation: Simulation | None) -> RunContext:
    default_name = f"{grid_name}-simulated" if simulation else grid_name
    folder = safe_name(default_name) if given.name is None else given.name
    study_dir = resolved("--output-dir", given.output_dir / folder)
    check_options(given.address, given.storage, given.search)
    return RunContext(
        study_dir=study_dir,
        data_dir=given.data_dir,
        weights=given.weights,
        device=preflight.choose_device(given.device),
        num_threads=given.cpus_per_trial or max(1, cores() // (given.max_concurrent or 1)),
        simulation=simulation,
        keep_checkpoints=given.keep_checkpoints,
        storage=place_of(given.storage, study_dir.name),
        on_cluster=given.address != "local",
        epoch_s=given.epoch_s or 0,
    )


def _run(
    console: Console,
    trials: Sequence[TrialConfig],
    context: RunContext,
    options: dict[str, Any],
    command: str,
    max_hours: float | None,
    logged: Trackers | None,
) -> int:
    """Runs what is to do, collects the tables, and returns the exit code."""
    study_dir = context.study_dir
    search = options.get("search")
    waiting = studies.todo(trials, study_dir)
    done = len(trials) - len(waiting)
    planned = search.planned if search else len(trials)
    if done >= planned:
        console.print(f"nothing to do: all {planned} trials of this command have ended")
    elif done:
        console.print(f"continuing: {done} of {planned} trials have ended")
    Stop.reset(max_hours)
    try:
        if logged:
            logged.catch_up(trials)
            options = {**options, "trackers": logged}
        now = done < planned and _train(console, waiting, context, options, command, planned, done)
        trials = search.trials if search else trials
        if logged:
            logged.close(trials)
        studies.collect(study_dir)
        _say_where(console, context, report=not now)
        if (store := options["store"]) and Stop.reason not in ("lease", "storage"):
            push_end(store, [trial.trial_id for trial in trials])
    except Exception as error:
        if full := disk_full(error, study_dir):
            raise full from error
        raise
    ends = studies.statuses(trials, study_dir)
    unfinished = studies.todo(trials, study_dir) or len(trials) < planned
    if Stop.reason and unfinished:
        console.print(f"{STOPPED[Stop.reason]}; continue with: {command}")
        return EXIT_STOPPED[Stop.reason]
    return judge(console, ends, study_dir)


STOPPED = {
    "storage": "stopped, because the store of --storage does not answer",
    "lease": "stopped, because another run has taken this study over in the store",
    "disk": "stopped, because the disk is full: free some space",
    "time": "stopped, because the time of --max-hours is over",
    "interrupt": "interrupted",
    "terminate": "terminated",
}


def _train(
    console: Console,
    waiting: Sequence[TrialConfig],
    context: RunContext,
    options: dict[str, Any],
    command: str,
    planned: int,
    done: int,
) -> bool:
    """Whether the user wanted to stop at once, in the middle of an epoch."""
    epochs = {trial.trial_id: trial.training.num_train_epochs for trial in waiting}
    progress = Progress(console, context.study_dir, planned, done, epochs)

    def on_dead_ray(name: str) -> None:
        """The main thread waits for an answer of Ray's that will never come."""
        progress.__exit__()
        studies.collect(context.study_dir)
        console.print(f"Ray's {name} process died; continue with: {command}")
        sys.stdout.flush()
        # A SIGTERM to the whole process group takes Ray with it: then that is the reason.
        os._exit(EXIT_STOPPED[Stop.reason] if Stop.reason else EXIT_FAILED)

    try:
        with progress:
            studies.run(waiting, context, progress, on_dead_ray=on_dead_ray, **options)
    except KeyboardInterrupt:
        Stop.request("interrupt")
        return True
    return False


def _say_where(console: Console, context: RunContext, *, report: bool) -> None:
    from analysis.report import write_report
    from tune_study.report_images import show_figures

    study_dir = context.study_dir
    console.print(f"results:     {study_dir}")
    if context.storage:
        console.print(f"kept in:     {masked(context.storage)}")
    if report:
        console.print(f"report:      {write_report(study_dir)}")
        show_figures(study_dir)
    console.print(f"TensorBoard: tensorboard --logdir {study_dir / 'tensorboard'}")


def judge(console: Console, statuses: dict[str, str], study_dir: Path) -> int:
    """0 when every planned trial ended well; else 1, after a list of those that did not."""
    bad = {trial: status for trial, status in statuses.items() if status not in PLANNED_ENDS}
    if not bad:
        pruned = list(statuses.values()).count("pruned")
        rest = f", {pruned} of them pruned" if pruned else ""
        console.print(f"all {len(statuses)} trials ended well{rest}")
        return 0
    console.print(f"{len(bad)} of {len(statuses)} trials did not end well:")
    for trial_id, status in bad.items():
        console.print(f"  {trial_id}: {status} (see {study_dir / trial_id})")
    console.print("run them again with --retry-failed added to the command")
    return EXIT_FAILED


def with_compute_dtype(
    console: Console, trials: Sequence[TrialConfig], context: RunContext
) -> list[TrialConfig]:
    """``settle_compute_dtype`` for the study in its folder, and a note where that mattered."""
    folder = context.study_dir
    settled, reason = settle_compute_dtype(
        trials, context.device, manifest.planned_ids(folder), manifest.settled_compute_dtype(folder)
    )
    if reason:
        fp32 = any(trial.training.compute_dtype == "fp32" for trial in settled)
        so = "so the trials compute in fp32; --set training.compute_dtype=bf16 overrides"
        as_begun = "and the study in this folder computes in bf16; another --name would not"
        console.print(f"note: {reason}, {so if fp32 else as_begun}")
    return settled


def extension_of(
    trials: Sequence[TrialConfig], context: RunContext, retry_failed: bool
) -> Extension | None:
    """What the command does in the study that is in its folder; ``None`` where there is none."""
    planned = manifest.planned_ids(context.study_dir)
    if not planned:
        return None
    return held_against(trials, planned, context.study_dir, retry_failed=retry_failed)


def say_what_is_unusual(
    console: Console, trials: Sequence[TrialConfig], simulation: Simulation | None
) -> None:
    """Whether the trials are drawn, or start from random weights."""
    if simulation:
        console.print("note: SIMULATED: results are drawn from a model, nothing is trained")
    elif any(not trial.pretrained for trial in trials):
        console.print("note: pretrained=false: the backbones start from RANDOM weights")


def say_long_warm_up(console: Console, trials: Sequence[TrialConfig], checked: Checked) -> None:
    """Of the first trial whose warm-up is as long as its training."""
    for trial in trials:
        training = trial.training
        if trial.trial_id in checked.data:
            images = len(checked.data[trial.trial_id].train.labels)
            per_epoch = math.ceil(images / trial.images_per_step)
            steps = per_epoch * training.num_train_epochs
            if training.warmup_steps >= steps:
                console.print(
                    f"note: the warm-up of {training.warmup_steps} steps never ends in the {steps} "
                    "steps of a trial; see --set training.warmup_steps"
                )
                return
