"""What ``--dry-run`` prints: the planned trials, what each would take, and what the study has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from tune_study.config import TrialConfig
from tune_study.estimate import Estimate, estimate
from tune_study.extension import Extension
from tune_study.limits import within_memory
from tune_study.predict import expected_weights_bytes
from tune_study.progress import duration
from tune_study.simulate import CLASSES
from tune_study.targets import skeleton_of

if TYPE_CHECKING:
    from tune_study.preflight import Checked
    from tune_study.trainable import RunContext

WIDTH = 110
"""Columns of text for a trial's id and its figures."""


def print_plan(
    console: Console,
    trials: Sequence[TrialConfig],
    checked: Checked,
    context: RunContext,
    extension: Extension | None = None,
    notes: Sequence[str] = (),
) -> None:
    """The table of the plan, with a status where the study folder is there already."""
    for note in notes:
        console.print(f"note: {note}")
    table = Table(title=f"{len(trials)} planned trials", title_justify="left")
    table.add_column("trial", no_wrap=True)
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
            *([extension.states[trial.trial_id]] if extension else []),
            f"{row.weights_bytes / 1e6:.2f}",
            "unknown" if math.isnan(row.peak_train_bytes) else f"{row.peak_train_bytes / 1e6:.0f}",
            "unknown" if math.isnan(row.train_time_s) else duration(row.train_time_s),
        )
    Console(highlight=False, width=max(console.width, WIDTH)).print(table)
    distinct = f"{len({trial.trial_id for trial in trials})} distinct ids."
    if extension:
        distinct += f" In {context.study_dir.name}: {extension.sentence}."
    if context.simulation is not None:
        console.print(f"{distinct} Simulated: nothing would be trained.")
        return
    console.print(
        f"{distinct} Base weights are exact; the peak of a "
        "training step is within about 2 % on a CPU (docs/memory.md), and the time of all epochs "
        f"on this machine within a factor of about 2: {duration(total)} in all."
    )


def _row(trial: TrialConfig, checked: Checked, context: RunContext) -> Estimate:
    """A simulated trial has bytes of weights, and no step and no time."""
    if context.simulation is None:
        taken = within_memory(trial, context.study_dir / trial.trial_id)
        return estimate(taken, checked.data[trial.trial_id], torch.device(context.device))
    skeleton = skeleton_of(trial.model, CLASSES.get(trial.dataset, 10), trial.data.image_size)
    return Estimate(expected_weights_bytes(skeleton, trial), math.nan, math.nan)
