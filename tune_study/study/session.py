"""One start of a study by a command: plan, check, run, report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from analysis.load import Study, rebuild, write_tables
from search_spaces.lookup import code_of
from search_spaces.own_code import Code
from tune_study.cluster.connection import check_options
from tune_study.cluster.placement import share_of
from tune_study.cluster.stop import Stop
from tune_study.config import TrialConfig
from tune_study.data.splits import UNKNOWN
from tune_study.errors import UserError
from tune_study.folder.lock import lock
from tune_study.folder.remote import masked
from tune_study.folder.store import Store, held, place_of, push_all, push_end
from tune_study.loggers import trackers
from tune_study.loggers.progress import Progress
from tune_study.loggers.trackers import Trackers
from tune_study.machine import device, gpus
from tune_study.machine.disk import disk_full, refuse_full_disk
from tune_study.machine.gpus import Need
from tune_study.machine.provenance import cores
from tune_study.memory.estimate import need_of
from tune_study.search import settings as spaces
from tune_study.search.settings import Settings
from tune_study.study import auto_batch, manifest, preflight, schedule, sharing, status
from tune_study.study.cards import write_cards
from tune_study.study.console import (
    STOPPED,
    judge,
    print_plan,
    quoted,
    say_long_warm_up,
    say_planted_nowhere,
    say_what_is_passed_over,
    say_what_is_unusual,
    say_what_was_adapted,
    say_why_eager,
)
from tune_study.study.options import EXIT_FAILED, EXIT_STOPPED, Options, resolved, safe_name
from tune_study.study.plan import trials_of, with_compute_dtype, with_one_name
from tune_study.study.preflight import Checked
from tune_study.study.status import NEW, extension_of
from tune_study.trial.context import RunContext, Simulation, parse_effect

if TYPE_CHECKING:
    from tune_study.search.search import Search


THREADS_BESIDE_GPU = 2
"""Of a trial that shares a GPU: one feeds it, and one reads images."""


@dataclass
class Command:
    """What a command asks for, settled step by step."""

    given: Options
    console: Console
    context: RunContext
    settings: Settings | None
    """Of a search; ``None`` for a grid."""
    trials: list[TrialConfig]
    auto: bool
    """Whether ``--batch auto`` chooses the micro-batch."""
    line: str
    """As it can be typed again."""
    need: Need | None = None
    """What trials take of a GPU, where ``--gpus-per-trial auto`` asks for it."""

    def settle_sharing(self, checked: Checked) -> None:
        """``--max-concurrent auto`` becomes a number, and a trial's share of a GPU and of cores."""
        if not status.todo(self.trials, self.context.study_dir):
            return
        planned = [(trial, checked.data[trial.trial_id]) for trial in self.trials]
        count = sharing.choose(planned, self.context, self.say)
        at_a_time = count * gpus.count()
        self.given = replace(self.given, max_concurrent=at_a_time, gpus_per_trial=share_of(count))
        threads = self.given.cpus_per_trial or _threads(self.given)
        self.context = self.context.model_copy(update={"num_threads": threads})

    def settle_names(self) -> None:
        """A folder of images goes by the name that the study has for it."""
        names = manifest.names_in(self.context.study_dir)
        self.trials = with_one_name(self.trials, names)
        self.settings = self.settings and self.settings.with_names(names)

    def say(self, line: str) -> None:
        """One line, which stays one where the terminal is narrow: it can be copied."""
        self.console.print(line, soft_wrap=True)


def execute(given: Options) -> int:
    """Runs the command and returns its exit code. Raises ``UserError``."""
    tracker_modules = trackers.modules(given.log or [])
    command = _command(given)
    context = command.context
    with ExitStack() as holds:
        store = None
        if given.works and context.storage:  # what is there decides what follows
            holds.enter_context(lock(context.study_dir))
            store = holds.enter_context(_held(command))
        command.settle_names()
        drawn = command.trials
        checked = _look(command)
        choices = auto_batch.known(command.trials, context.study_dir, auto=command.auto)
        say_long_warm_up(command.console, command.trials, checked)
        if given.dry_run:
            return _dry_run(command, checked, choices)
        if given.validate_only:
            preflight.validate(command.trials, checked, context)
            command.say(f"{len(command.trials)}/{len(command.trials)} valid")
            return 0
        refuse_full_disk(context.study_dir)
        if store is None:
            holds.enter_context(lock(context.study_dir))
        _open(command, checked, fp32=command.trials != drawn)
        logged = trackers.opened(tracker_modules, context.study_dir, command.say)
        if given.retry_failed:
            status.forget(command.trials, context.study_dir)
        if command.given.max_concurrent == "auto":
            command.settle_sharing(checked)
        auto_batch.choose(
            command.trials, context, choices, command.console.print, auto=command.auto
        )
        if store:
            push_all(store, [trial.trial_id for trial in command.trials])
        return _run(command, store, logged)


def _command(given: Options) -> Command:
    settings, grid_name, trials = trials_of(given)
    # Names of the user's may look like markup ([exp]) or like an emoji's (:cat:).
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
    if given.max_concurrent == "auto":
        given = sharing.on_cuda_alone(given, console.print)
    context = _context(given, grid_name, trials, _simulation(given))
    auto = auto_batch.wanted(
        given.batch,
        context,
        search=given.search,
        max_concurrent=given.max_concurrent,
        gpus_per_trial=given.gpus_per_trial,
    )
    line = masked(shlex.join(["python", "-m", "tune_study.run", *sys.argv[1:]]))
    if given.gpus_per_trial == "auto" and context.device != "cuda":
        raise UserError(
            f"--gpus-per-trial auto: trials on {context.device} have no GPU to share; leave it out"
        )
    return Command(given, console, context, settings, trials, auto, line)


def _held(command: Command) -> AbstractContextManager[Store | None]:
    """The study in its store, held by this run."""
    context = command.context
    assert context.storage is not None
    return held(
        context.storage, context.study_dir, command.console.print, lambda: Stop.request("lease")
    )


def _look(command: Command) -> Checked:
    """Every input looked at, and the trials' compute dtype settled, before anything is written."""
    context = command.context
    if command.given.resume and not (context.study_dir / "study.json").is_file():
        raise UserError(
            f"--resume: there is no study in {context.study_dir}; leave it out to begin one"
        )
    if context.simulation is None:
        command.trials = with_compute_dtype(command.console, command.trials, context)
    say_what_is_unusual(command.console, command.trials, context.simulation)
    if context.simulation and command.settings is None:
        say_planted_nowhere(command.console, command.trials, context.simulation)
    checked = preflight.check(
        command.trials,
        context,
        auto_batch=command.auto,
        adapt_weights=command.given.adapt_weights,
        dry=command.given.dry_run,
    )
    for line in checked.told:
        command.say(line)
    if command.given.works and command.given.gpus_per_trial == "auto":
        planned = [(trial, checked.data[trial.trial_id]) for trial in command.trials]
        command.need = need_of(planned, torch.device(context.device))
    say_what_was_adapted(command.console, checked)
    if context.simulation is None:
        say_what_is_passed_over(command.console, command.trials)
        say_why_eager(command.console, command.trials, context.device)
    return checked


def _dry_run(command: Command, checked: Checked, choices: Mapping[str, Any]) -> int:
    trials, context = command.trials, command.context
    review = manifest.review(trials, context, checked.checksums)
    notes, plan = review.notes, list(review.cells.values())
    extension = extension_of(trials, context, command.given.retry_failed)
    if command.auto and len(choices) < len(trials):
        notes = [*notes, auto_batch.NOT_YET]
    if command.given.max_concurrent == "auto":
        notes = [*notes, sharing.NOT_YET]
    if missing := [f"the {k} of {' and '.join(n)}" for k, n in checked.not_here.items() if n]:
        notes = [
            *notes,
            f"a dry run downloads and draws nothing, and did not look at {'; '.join(missing)}",
        ]
    if any(not seen.is_known for seen in checked.data.values()):
        notes = [
            *notes,
            "the classes of images that are not here are not known: bytes are those of a head for "
            f"{UNKNOWN.classes}, ids are exact",
        ]
    print_plan(command.console, trials, checked, context, extension, notes, plan)
    return 0


def _open(command: Command, checked: Checked, *, fp32: bool) -> None:
    """study.json: begun, continued or extended, and what of that the user should know."""
    given, context = command.given, command.context
    if command.settings:
        command.settings, command.trials = spaces.continued(
            command.settings, context.study_dir, compute_dtype="fp32" if fp32 else None
        )
    settings, extension = command.settings, None
    if not settings:
        extension = extension_of(command.trials, context, given.retry_failed)
    for note in manifest.open_study(
        command.trials,
        context,
        checked.checksums,
        grid=settings.space if settings else given.grid or "demo",
        command=command.line,
        search=settings.record() if settings else None,
    ):
        command.console.print(f"note: {note}")
    if extension and (extension.others or NEW in extension.states.values()):
        command.console.print(f"extending {context.study_dir.name}: {extension.sentence}")


def _simulation(given: Options) -> Simulation | None:
    if given.simulate:
        sd = {} if given.seed_sd is None else {"seed_sd": given.seed_sd}
        return Simulation(effects=dict(map(parse_effect, given.effect or [])), **sd)
    if given.effect or given.seed_sd is not None:
        raise UserError("--effect and --seed-sd belong to --simulate; add it, or leave them out")
    return None


def _context(
    given: Options, grid_name: str, trials: Sequence[TrialConfig], simulation: Simulation | None
) -> RunContext:
    default_name = f"{grid_name}-simulated" if simulation else grid_name
    folder = safe_name(default_name) if given.name is None else given.name
    study_dir = resolved("--output-dir", given.output_dir / folder)
    check_options(given.address, given.storage)
    return RunContext(
        study_dir=study_dir,
        data_dir=given.data_dir,
        cache_dir=given.cache_dir,
        leave_out_broken=given.leave_out_broken,
        weights=given.weights,
        code=_code(given, trials),
        device=device.choose_device(given.device),
        num_threads=given.cpus_per_trial or _threads(given),
        simulation=simulation,
        keep_checkpoints=given.keep_checkpoints,
        storage=place_of(given.storage, study_dir.name),
        on_cluster=given.address != "local",
        epoch_s=given.epoch_s or 0,
    )


def _code(given: Options, trials: Sequence[TrialConfig]) -> Code | None:
    """The user's own file, with those of its functions that transform these trials' images."""
    code = code_of(*(("--space", given.space) if given.search else ("--grid", given.grid)))
    transforms = {name for trial in trials if (name := trial.data.transform) is not None}
    return code and code._replace(transforms=tuple(sorted(transforms)))


def _threads(given: Options) -> int:
    if "auto" in (given.gpus_per_trial, given.max_concurrent):  # how many share is found out later
        return THREADS_BESIDE_GPU
    return max(1, cores() // (given.max_concurrent or 1))


def _run(command: Command, store: Store | None, logged: Trackers | None) -> int:
    """Runs what is to do, collects the tables, and returns the exit code."""
    context, console, trials = command.context, command.console, command.trials
    study_dir = context.study_dir
    search = _search(command)
    waiting = status.todo(trials, study_dir)
    done = len(trials) - len(waiting)
    planned = search.planned if search else len(trials)
    if done >= planned:
        console.print(f"nothing to do: all {planned} trials of this command have ended")
    elif done:
        console.print(f"continuing: {done} of {planned} trials have ended")
    Stop.reset(command.given.max_hours)
    try:
        if logged:
            logged.catch_up(trials)
        now = done < planned and _train(
            command, waiting, _progress(command, waiting, planned, done), search, store, logged
        )
        trials = search.trials if search else trials
        if logged:
            logged.close(trials)
        collect(study_dir)
        write_cards(study_dir)
        _say_where(command, report=not now)
        if store and Stop.reason not in ("lease", "storage"):
            push_end(store, [trial.trial_id for trial in trials])
    except Exception as error:
        if full := disk_full(error, study_dir):
            raise full from error
        raise
    ends = status.statuses(trials, study_dir)
    unfinished = status.todo(trials, study_dir) or len(trials) < planned
    if Stop.reason and unfinished:
        command.say(f"{STOPPED[Stop.reason]}; continue with: {command.line}")
        return EXIT_STOPPED[Stop.reason]
    return judge(console, ends, study_dir)


def _search(command: Command) -> Search | None:
    if command.settings is None:
        return None
    from tune_study.search.search import Search  # Optuna takes a second to import

    return Search(command.settings, command.context, command.trials)


def _progress(
    command: Command, waiting: Sequence[TrialConfig], planned: int, done: int
) -> Progress:
    epochs = {trial.trial_id: trial.training.num_train_epochs for trial in waiting}
    study_dir = command.context.study_dir
    plan = [] if command.settings else manifest.plan_of(study_dir)
    return Progress(command.console, study_dir, planned, done, epochs, plan)


def _train(
    command: Command,
    waiting: Sequence[TrialConfig],
    progress: Progress,
    search: Search | None,
    store: Store | None,
    logged: Trackers | None,
) -> bool:
    """Whether the user wanted to stop at once, in the middle of an epoch."""
    given, context = command.given, command.context

    def on_dead_ray(name: str) -> None:
        """The main thread waits for an answer of Ray's that will never come."""
        progress.__exit__()
        collect(context.study_dir)
        command.say(f"Ray's {name} process died; continue with: {command.line}")
        sys.stdout.flush()
        # A SIGTERM to the whole process group takes Ray with it: then that is the reason.
        os._exit(EXIT_STOPPED[Stop.reason] if Stop.reason else EXIT_FAILED)

    try:
        with progress:
            schedule.run(
                waiting,
                context,
                progress,
                on_dead_ray=on_dead_ray,
                address=given.address,
                max_concurrent=given.max_concurrent,
                gpus_per_trial=command.need or given.gpus_per_trial,
                dashboard=given.dashboard,
                search=search,
                store=store,
                trackers=logged,
            )
    except KeyboardInterrupt:
        Stop.request("interrupt")
        return True
    return False


def _say_where(command: Command, *, report: bool) -> None:
    """Paths and a command as a shell takes them."""
    from analysis.report import write_report
    from tune_study.loggers.event_files import show_figures

    storage, study_dir = command.context.storage, command.context.study_dir
    command.say(f"results:     {quoted(study_dir)}")
    if storage:
        command.say(f"kept in:     {shlex.quote(masked(storage))}")
    if report:
        command.say(f"report:      {quoted(write_report(study_dir))}")
        show_figures(study_dir)
    command.say(f"TensorBoard: tensorboard --logdir {quoted(study_dir / 'tensorboard')}")


def collect(study_dir: Path) -> Study:
    """The tables of the study, from the trials' own files, written beside them."""
    study = rebuild(study_dir)
    write_tables(study, study_dir)
    return study
