"""The command line: ``python -m tune_study.run --grid full``."""

# ruff: noqa: E402  (Ray and torch read the environment while they are imported)
from __future__ import annotations

from tune_study import environment

environment.prepare()

import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import ray
import typer
from rich.console import Console

from tune_study import local_ray
from tune_study.config import TrialConfig, UserError, parse_assignment
from tune_study.options import (
    DEVICES,
    one_of,
    refuse_not_finite,
    refuse_unknown_function,
    resolved,
    safe_name,
)
from tune_study.remote import masked
from tune_study.schema import PLANNED_ENDS

if TYPE_CHECKING:
    from tune_study.extension import Extension
    from tune_study.preflight import Checked
    from tune_study.simulate import Simulation
    from tune_study.trackers import Trackers
    from tune_study.trainable import RunContext

EXIT_FAILED, EXIT_USER = 1, 2
EXIT_STOPPED = {
    "storage": 1,
    "lease": 1,
    "disk": 1,
    "time": 124,
    "interrupt": 130,
    "terminate": 143,
}
"""By the reason why a study stopped early: the shell's own codes for time and signals."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    grid: Annotated[
        str | None,
        typer.Option(help="demo (the default), full, smoke, or path/to/my_grid.py:my_function"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="study folder; default: the grid's name")] = None,
    output_dir: Annotated[Path, typer.Option(help="where study folders lie")] = Path("ray_results"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="e.g. training.num_train_epochs=3"),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="CIFAR: torchvision's layout or Hugging Face parquet")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="file, or folder with MODEL.safetensors; default: the hub")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps or cuda")] = "auto",
    train_size: Annotated[int | None, typer.Option(help="stratified subset, in images")] = None,
    val_size: Annotated[int | None, typer.Option(help="validation images")] = None,
    test_size: Annotated[int | None, typer.Option(help="stratified subset, in images")] = None,
    max_experiments: Annotated[int | None, typer.Option(min=1, help="only the first N")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URI", help="where studies are kept, such as s3://bucket/path"),
    ] = None,
    address: Annotated[
        str, typer.Option(help="local, or a Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    ] = "local",
    batch: Annotated[
        str | None, typer.Option(help="auto: the fastest micro-batch that fits, for all modes")
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="trials at a time; default 1, on a cluster all that fit"
        ),
    ] = None,
    cpus_per_trial: Annotated[
        int | None, typer.Option(min=1, max=1024, help="cores and threads of a trial")
    ] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, help="share of a GPU, such as 0.5")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="show the planned trials and exit")] = False,
    validate_only: Annotated[bool, typer.Option(help="build and check every model")] = False,
    resume: Annotated[bool, typer.Option(help="refuse to begin a new study")] = False,
    retry_failed: Annotated[bool, typer.Option(help="run failed trials again")] = False,
    max_hours: Annotated[
        float | None, typer.Option(min=0, help="stop at an epoch's end after so many hours")
    ] = None,
    keep_checkpoints: Annotated[
        str, typer.Option(help="of finished trials: all, best (the adapter) or none")
    ] = "best",
    simulate: Annotated[
        bool, typer.Option(help="draw the trials from a model instead of training them")
    ] = False,
    effect: Annotated[
        list[str] | None,
        typer.Option(metavar="MODE=DIFFERENCE", help="planted by --simulate, e.g. nf4=-0.01"),
    ] = None,
    seed_sd: Annotated[
        float | None, typer.Option(min=0, max=1, help="of --simulate; default 0.004")
    ] = None,
    epoch_s: Annotated[
        float | None, typer.Option(min=0, help="of --simulate: how long an epoch lasts")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="optuna: search a space instead of running a grid")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="qlora (the default), demo, or path/to/my_space.py:my_function"),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="trials of a search; default 40")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="one or two: val_accuracy, weights_bytes, peak_train_bytes, train_time_s"
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="asha prunes a search with one objective; default fifo")
    ] = None,
    search_seed: Annotated[
        int | None, typer.Option(min=0, help="of what a search suggests; default 0")
    ] = None,
    log: Annotated[
        list[str] | None, typer.Option(help="mlflow or wandb: the trials in a tracker as well")
    ] = None,
    dashboard: Annotated[bool, typer.Option(help="start Ray's dashboard")] = False,
) -> None:
    """Run a study of quantized LoRA fine-tuning; the same command continues an interrupted one."""
    if address.startswith("ray://"):
        raise typer.Exit(_on_head(address, storage, search))
    sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
    assignments = [parse_assignment(text) for text in set_ or []]
    assignments += [(f"data.{key}", size) for key, size in sizes.items() if size is not None]
    if grid:
        refuse_unknown_function("--grid", grid, "search_spaces.grids")
    if space:
        refuse_unknown_function("--space", space, "search_spaces.optuna_spaces")
    one_of("--device", device, DEVICES)
    keep = one_of("--keep-checkpoints", keep_checkpoints, ("all", "best", "none"))
    refuse_not_finite("--gpus-per-trial", gpus_per_trial)
    refuse_not_finite("--max-hours", max_hours)
    refuse_not_finite("--seed-sd", seed_sd)
    refuse_not_finite("--epoch-s", epoch_s)
    if name is not None:
        safe_name(name)
    data_dir = resolved("--data-dir", data_dir, "folder") if data_dir else None
    weights = resolved("--weights", weights, "file or folder") if weights else None
    if epoch_s is not None and not simulate:
        raise UserError("--epoch-s belongs to --simulate; add it, or leave it out")
    if simulate and validate_only:
        raise UserError("--simulate trains nothing: leave out --validate-only")
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if address == "local" and not (dry_run or validate_only):
        local_ray.start_during_imports(max_concurrent or 1, dashboard=dashboard)
    from tune_study import batch as batches
    from tune_study import manifest, preflight, trackers
    from tune_study import space as spaces
    from tune_study import study as studies
    from tune_study.cluster import check_options
    from tune_study.dry_run import print_plan
    from tune_study.extension import NEW
    from tune_study.limits import refuse_full_disk
    from tune_study.storage import held, push_all
    from tune_study.store import place_of
    from tune_study.supervise import only_run
    from tune_study.trainable import RunContext

    tracker_modules = trackers.modules(log or [])
    settings = spaces.settings(
        search=search,
        space=space,
        num_samples=num_samples,
        objectives=objective,
        scheduler=scheduler,
        seed=search_seed,
        assignments=assignments,
        find=studies.function_of,
    )
    if settings:
        spaces.refuse_grid_options(settings, grid, max_experiments, dry_run, simulate)
        grid_name, trials = settings.name, spaces.largest(spaces.probes(settings))
    else:
        grid_name, param_space = studies.load_grid(grid or "demo")
        trials = studies.plan(param_space, assignments)[:max_experiments]
    simulation = _simulation(simulate, effect or [], seed_sd)
    default_name = f"{grid_name}-simulated" if simulation else grid_name
    folder = safe_name(default_name) if name is None else name
    study_dir = resolved("--output-dir", output_dir / folder)
    check_options(address, storage, search)
    context = RunContext(
        study_dir=study_dir,
        data_dir=data_dir,
        weights=weights,
        device=preflight.choose_device(device),
        num_threads=cpus_per_trial or _threads(max_concurrent or 1),
        simulation=simulation,
        keep_checkpoints=keep,
        storage=place_of(storage, study_dir.name),
        on_cluster=address != "local",
        epoch_s=epoch_s or 0,
    )
    auto = batches.wanted(
        batch, context, search=search, max_concurrent=max_concurrent, gpus_per_trial=gpus_per_trial
    )
    with ExitStack() as holds:
        works = not (dry_run or validate_only)
        store = None
        if works and context.storage:  # what is there decides what follows
            holds.enter_context(only_run(study_dir))
            store = holds.enter_context(held(context.storage, study_dir, console.print))
        if resume and not (study_dir / "study.json").is_file():
            raise UserError(
                f"--resume: there is no study in {study_dir}; leave it out to begin one"
            )
        drawn = trials
        if not simulation:
            trials = _settle_compute_dtype(console, trials, context)
        _say_what_is_unusual(console, trials, simulation)
        checked = preflight.check(trials, context, auto_batch=auto)
        choices = batches.known(trials, study_dir, auto=auto)
        _say_long_warm_up(console, trials, checked)
        if dry_run:
            notes = manifest.review(trials, context, checked.checksums).notes
            extension = _extension(trials, context, retry_failed)
            if auto and len(choices) < len(trials):
                notes = [*notes, batches.NOT_YET]
            print_plan(console, trials, checked, context, extension, notes)
            return
        if validate_only:
            preflight.validate(trials, checked, context)
            console.print(f"{len(trials)}/{len(trials)} valid")
            return
        command = masked(shlex.join(["python", "-m", "tune_study.run", *sys.argv[1:]]))
        options: dict[str, Any] = {
            "address": address,
            "max_concurrent": max_concurrent,
            "gpus_per_trial": gpus_per_trial,
            "dashboard": dashboard,
            "store": store,
        }
        refuse_full_disk(study_dir)
        if store is None:
            holds.enter_context(only_run(study_dir))
        if settings:
            settled = "fp32" if trials != drawn else None
            settings, trials = spaces.continued(settings, study_dir, compute_dtype=settled)
        extension = None if settings else _extension(trials, context, retry_failed)
        for note in manifest.open_study(
            trials,
            context,
            checked.checksums,
            grid=settings.space if settings else grid or "demo",
            command=command,
            search=settings.record() if settings else None,
        ):
            console.print(f"note: {note}")
        if extension and (extension.others or NEW in extension.states.values()):
            console.print(f"extending {study_dir.name}: {extension.sentence}")
        logged = trackers.opened(
            tracker_modules, study_dir, lambda line: console.print(line, markup=False)
        )
        if retry_failed:
            studies.forget(trials, study_dir)
        batches.choose(trials, context, choices, console.print, auto=auto)
        if store:
            push_all(store, trials)
        if settings:
            from tune_study.search import Search

            options["search"] = Search(settings, context, trials)
        raise typer.Exit(_run(console, trials, context, options, command, max_hours, logged))


def _on_head(address: str, storage: str | None, search: str | None) -> int:
    from tune_study.client import run_on_head
    from tune_study.cluster import check_options

    check_options(address, storage, search)
    return run_on_head(address, sys.argv[1:])


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
    from tune_study import study as studies
    from tune_study.limits import disk_full
    from tune_study.storage import push_end
    from tune_study.supervise import Stop

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
            push_end(store, trials)
    except Exception as error:
        if full := disk_full(error, study_dir):
            raise full from error
        raise
    statuses = studies.statuses(trials, study_dir)
    unfinished = studies.todo(trials, study_dir) or len(trials) < planned
    if Stop.reason and unfinished:
        console.print(f"{_STOPPED[Stop.reason]}; continue with: {command}")
        return EXIT_STOPPED[Stop.reason]
    return _judge(console, statuses, study_dir)


_STOPPED = {
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
    from tune_study import study as studies
    from tune_study.progress import Progress
    from tune_study.supervise import Stop

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


def _judge(console: Console, statuses: dict[str, str], study_dir: Path) -> int:
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


def _simulation(simulate: bool, effects: list[str], seed_sd: float | None) -> Simulation | None:
    from tune_study.simulate import Simulation, parse_effect

    if simulate:
        sd = {} if seed_sd is None else {"seed_sd": seed_sd}
        return Simulation(effects=dict(map(parse_effect, effects)), **sd)
    if effects or seed_sd is not None:
        raise UserError("--effect and --seed-sd belong to --simulate; add it, or leave them out")
    return None


def _settle_compute_dtype(
    console: Console, trials: Sequence[TrialConfig], context: RunContext
) -> list[TrialConfig]:
    from tune_study.estimate import settle_compute_dtype
    from tune_study.manifest import planned_ids, settled_compute_dtype

    folder = context.study_dir
    settled, reason = settle_compute_dtype(
        trials, context.device, planned_ids(folder), settled_compute_dtype(folder)
    )
    if reason:
        fp32 = any(trial.training.compute_dtype == "fp32" for trial in settled)
        so = "so the trials compute in fp32; --set training.compute_dtype=bf16 overrides"
        as_begun = "and the study in this folder computes in bf16; another --name would not"
        console.print(f"note: {reason}, {so if fp32 else as_begun}")
    return settled


def _extension(
    trials: Sequence[TrialConfig], context: RunContext, retry_failed: bool
) -> Extension | None:
    """What the command does in the study that is in its folder; ``None`` where there is none."""
    from tune_study.extension import held_against
    from tune_study.manifest import planned_ids

    planned = planned_ids(context.study_dir)
    if not planned:
        return None
    return held_against(trials, planned, context.study_dir, retry_failed=retry_failed)


def _threads(max_concurrent: int) -> int:
    from tune_study.provenance import cores

    return max(1, cores() // max_concurrent)


def _say_what_is_unusual(
    console: Console, trials: Sequence[TrialConfig], simulation: Simulation | None
) -> None:
    if simulation:
        console.print("note: SIMULATED: results are drawn from a model, nothing is trained")
    elif any(not trial.pretrained for trial in trials):
        console.print("note: pretrained=false: the backbones start from RANDOM weights")


def _say_long_warm_up(console: Console, trials: Sequence[TrialConfig], checked: Checked) -> None:
    from tune_study.limits import images_per_step

    for trial in trials:
        training = trial.training
        if trial.trial_id in checked.data:
            images = len(checked.data[trial.trial_id].train.labels)
            per_epoch = math.ceil(images / images_per_step(trial))
            steps = per_epoch * training.num_train_epochs
            if training.warmup_steps >= steps:
                console.print(
                    f"note: the warm-up of {training.warmup_steps} steps never ends in the {steps} "
                    "steps of a trial; see --set training.warmup_steps"
                )
                return


def main() -> None:
    """Entry point: the user's mistakes are one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        line = "".join(letter if letter.isprintable() else " " for letter in str(error))
        print(f"error: {line}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", EXIT_USER))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_STOPPED["interrupt"])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
