"""What the user is told before and after: the planned trials, notes, how it ended."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tune_study.config import TrialConfig
from tune_study.folder.names import told_apart
from tune_study.folder.schema import PLANNED_ENDS
from tune_study.loggers.progress import duration
from tune_study.memory.estimate import Estimate, estimate
from tune_study.model.footprint import expected_weights_bytes
from tune_study.model.layers import passed_over, skeleton_of
from tune_study.model.weights import listed
from tune_study.study.manifest import cell_of
from tune_study.study.options import EXIT_FAILED
from tune_study.study.preflight import Checked
from tune_study.study.status import Extension
from tune_study.trial.context import RunContext, Simulation
from tune_study.trial.graph import why_eager
from tune_study.trial.micro_batch import within_memory
from tune_study.trial.simulate import CLASSES

STOPPED = {
    "storage": "stopped, because the store of --storage does not answer",
    "lease": "stopped, because another run has taken this study over in the store",
    "disk": "stopped, because the disk is full: free some space",
    "time": "stopped, because the time of --max-hours is over",
    "interrupt": "interrupted",
    "terminate": "terminated",
}

WIDTH = 110
"""Columns of text for a trial's id and its figures."""


def print_plan(
    console: Console,
    trials: Sequence[TrialConfig],
    checked: Checked,
    context: RunContext,
    extension: Extension | None = None,
    notes: Sequence[str] = (),
    plan: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The table of the plan, with a status where the study folder is there already.

    ``plan`` is what study.json would hold, other trials included: by it these are told apart.
    """
    for note in notes:
        console.print(f"note: {note}")
    table = Table(title=f"{len(trials)} planned trials", title_justify="left")
    table.add_column("trial", no_wrap=True)
    _, beside = told_apart(plan or [cell_of(trial) for trial in trials])
    beside = {trial.trial_id: beside[trial.trial_id] for trial in trials}
    if any(beside.values()):
        table.add_column("in words")
    if extension:
        table.add_column("status", no_wrap=True)
    for heading in ("weights, MB", "peak, MB", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    to_run = {trial.trial_id for trial in trials} if extension is None else {*extension.to_run}
    total = 0.0
    for trial in trials:
        row = _row(trial, checked, context)
        total += row.train_time_s if trial.trial_id in to_run else 0
        table.add_row(
            trial.trial_id,
            *([beside[trial.trial_id]] if any(beside.values()) else []),
            *([extension.states[trial.trial_id]] if extension else []),
            f"{row.weights_bytes / 1e6:.2f}",
            "unknown" if math.isnan(row.peak_train_bytes) else f"{row.peak_train_bytes / 1e6:.0f}",
            "unknown" if math.isnan(row.train_time_s) else duration(row.train_time_s),
        )
    width = max(console.width, WIDTH + max(map(len, beside.values()), default=0))
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)
    distinct = f"{len({trial.trial_id for trial in trials})} distinct ids: {_counted(trials)}."
    if extension:
        distinct += f" In {context.study_dir.name}: {extension.sentence}."
    if context.simulation is not None:
        console.print(f"{distinct} Simulated: nothing would be trained.")
        return
    console.print(
        f"{distinct} Base weights are exact; the peak of a "
        "training step is within about 2 % on a CPU (docs/memory.md), and the time of all epochs "
        "on this machine within a factor of about 2: "
        f"{'unknown' if math.isnan(total) else duration(total)} in all."
    )


def _counted(trials: Sequence[TrialConfig]) -> str:
    """What the statistics will stand on: ``6 configurations, 3 treatments, 3 seeds``."""
    counts = {
        "configuration": len({trial.configuration for trial in trials}),
        "treatment": len({trial.treatment for trial in trials}),
        "seed": len({trial.seed for trial in trials}),
    }
    return ", ".join(f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items())


def _row(trial: TrialConfig, checked: Checked, context: RunContext) -> Estimate:
    """A simulated trial has bytes of weights, and no step and no time."""
    if context.simulation is None:
        taken = within_memory(trial, context.study_dir / trial.trial_id)
        return estimate(taken, checked.data[trial.trial_id], torch.device(context.device))
    skeleton = skeleton_of(trial.model, CLASSES.get(trial.dataset, 10), trial.data.image_size)
    return Estimate(expected_weights_bytes(skeleton, trial), math.nan, math.nan)


def quoted(path: Path) -> str:
    """As it can be pasted into a shell."""
    return shlex.quote(str(path))


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
        console.print(f"  {trial_id}: {status} (see {quoted(study_dir / trial_id)})")
    console.print("run them again with --retry-failed added to the command")
    return EXIT_FAILED


def say_what_is_unusual(
    console: Console, trials: Sequence[TrialConfig], simulation: Simulation | None
) -> None:
    """Whether the trials are drawn, or start from random weights."""
    if simulation:
        console.print("note: SIMULATED: results are drawn from a model, nothing is trained")
    elif any(not trial.pretrained for trial in trials):
        console.print("note: pretrained=false: the backbones start from RANDOM weights")


def say_what_was_adapted(console: Console, checked: Checked) -> None:
    """Of weights that are not in a model as their file holds them."""
    words = {
        "left_out": "left out",
        "resampled": "resampled",
        "missing": "not in the file and left at their initial values",
    }
    for model, entry in checked.checksums["weights"].items():
        for kind, what in words.items():
            if names := entry.get(kind):
                console.print(f"note: weights of {model}, {what}: {listed(names)}")


def say_what_is_passed_over(console: Console, trials: Sequence[TrialConfig]) -> None:
    """Of what ``lora.target_modules`` matches, that which cannot have an adapter."""
    settings = {(t.model, t.data.image_size, t.lora.target_modules) for t in trials}
    for model, image_size, targets in sorted(settings, key=str):
        if over := passed_over(skeleton_of(model, 10, image_size), targets):
            console.print(
                f"note: lora.target_modules = {targets} of {model}: linear layers get an adapter, "
                f"{listed(over, of='module')} do not"
            )


def say_why_eager(console: Console, trials: Sequence[TrialConfig], device: str) -> None:
    """Once, where a trial leaves it open how its steps are taken, and a graph might be had."""
    for why in {why for trial in trials if (why := why_eager(trial, device))}:
        console.print(f"note: {why}")


def say_planted_nowhere(
    console: Console, trials: Sequence[TrialConfig], simulation: Simulation
) -> None:
    """An effect at a level that the plan lacks is a slip, or meant for trials that join later."""
    for effect in simulation.of_no_trial(trials):
        console.print(f"note: --effect {effect}: no trial of this plan has that mode and level")


def say_long_warm_up(console: Console, trials: Sequence[TrialConfig], checked: Checked) -> None:
    """Of the first trial whose warm-up is as long as its training."""
    for trial in trials:
        training = trial.training
        if trial.trial_id in checked.data and checked.data[trial.trial_id].is_known:
            images = checked.data[trial.trial_id].train
            per_epoch = math.ceil(images / trial.images_per_step)
            steps = per_epoch * training.num_train_epochs
            if training.warmup_steps >= steps:
                console.print(
                    f"note: the warm-up of {training.warmup_steps} steps never ends in the {steps} "
                    "steps of a trial; see --set training.warmup_steps"
                )
                return
