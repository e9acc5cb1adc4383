"""One start of a study by a command: plan, check, run, report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.load import Study, rebuild, write_tables
from tune_study.cluster.connection import check_options
from tune_study.cluster.stop import Stop
from tune_study.config import TrialConfig
from tune_study.errors import UserError
from tune_study.folder.lock import lock
from tune_study.folder.remote import masked
from tune_study.folder.store import held, place_of, push_all, push_end
from tune_study.loggers import trackers
from tune_study.loggers.progress import Progress
from tune_study.loggers.trackers import Trackers
from tune_study.machine import device
from tune_study.machine.disk import disk_full, refuse_full_disk
from tune_study.machine.provenance import cores
from tune_study.search import settings as spaces
from tune_study.study import auto_batch, manifest, preflight, schedule, status
from tune_study.study.console import (
    STOPPED,
    judge,
    print_plan,
    say_long_warm_up,
    say_what_is_unusual,
)
from tune_study.study.options import EXIT_FAILED, EXIT_STOPPED, Options, resolved, safe_name
from tune_study.study.plan import trials_of, with_compute_dtype
from tune_study.study.status import NEW, extension_of
from tune_study.trial.context import RunContext, Simulation, parse_effect


def execute(given: Options) -> int:
    """Runs the command and returns its exit code. Raises ``UserError``."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    tracker_modules = trackers.modules(given.log or [])
    settings, grid_name, trials = trials_of(given)
    simulation = _simulation(given)
    context = _context(given, grid_name, simulation)
    study_dir = context.study_dir
    auto = auto_batch.wanted(
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
        choices = auto_batch.known(trials, study_dir, auto=auto)
        say_long_warm_up(console, trials, checked)
        if given.dry_run:
            notes = manifest.review(trials, context, checked.checksums).notes
            extension = extension_of(trials, context, given.retry_failed)
            if auto and len(choices) < len(trials):
                notes = [*notes, auto_batch.NOT_YET]
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
            status.forget(trials, study_dir)
        auto_batch.choose(trials, context, choices, console.print, auto=auto)
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
            from tune_study.search.search import Search

            options["search"] = Search(settings, context, trials)
        return _run(console, trials, context, options, command, given.max_hours, logged)


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
        device=device.choose_device(given.device),
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
    waiting = status.todo(trials, study_dir)
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
        collect(study_dir)
        _say_where(console, context, report=not now)
        if (store := options["store"]) and Stop.reason not in ("lease", "storage"):
            push_end(store, [trial.trial_id for trial in trials])
    except Exception as error:
        if full := disk_full(error, study_dir):
            raise full from error
        raise
    ends = status.statuses(trials, study_dir)
    unfinished = status.todo(trials, study_dir) or len(trials) < planned
    if Stop.reason and unfinished:
        console.print(f"{STOPPED[Stop.reason]}; continue with: {command}")
        return EXIT_STOPPED[Stop.reason]
    return judge(console, ends, study_dir)


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
        collect(context.study_dir)
        console.print(f"Ray's {name} process died; continue with: {command}")
        sys.stdout.flush()
        # A SIGTERM to the whole process group takes Ray with it: then that is the reason.
        os._exit(EXIT_STOPPED[Stop.reason] if Stop.reason else EXIT_FAILED)

    try:
        with progress:
            schedule.run(waiting, context, progress, on_dead_ray=on_dead_ray, **options)
    except KeyboardInterrupt:
        Stop.request("interrupt")
        return True
    return False


def _say_where(console: Console, context: RunContext, *, report: bool) -> None:
    from analysis.report import write_report
    from tune_study.loggers.event_files import show_figures

    study_dir = context.study_dir
    console.print(f"results:     {study_dir}")
    if context.storage:
        console.print(f"kept in:     {masked(context.storage)}")
    if report:
        console.print(f"report:      {write_report(study_dir)}")
        show_figures(study_dir)
    console.print(f"TensorBoard: tensorboard --logdir {study_dir / 'tensorboard'}")


def collect(study_dir: Path) -> Study:
    """The tables of the study, from the trials' own files, written beside them."""
    study = rebuild(study_dir)
    write_tables(study, study_dir)
    return study
