"""TensorBoard's Custom Scalars: a group of charts per configuration, a curve per treatment.

The page colours by run. So each treatment has a run of its own, ``tensorboard/modes/<its name>``,
with the mean over the seeds of a configuration and treatment, epoch by epoch. It is written anew
when a mean has changed, from the trials' own files and from what the running ones report: a restart
adds no point. A large study takes long to write: then it is written more seldom.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import custom_scalars

from tune_study.cluster.callbacks import Callback
from tune_study.folder import names
from tune_study.folder.results import read_results
from tune_study.folder.schema import GOOD_STATUSES
from tune_study.loggers.event_files import RunFile, replace_run, scalar
from tune_study.loggers.hparams import Axis, axes_of, experiment

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

CHARTS = {
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "grad_norm_mean": "gradient norm",
}
"""What is drawn, by the column of the epochs table."""
WRITING_SHARE = 0.05
"""Of a run's time, at most: between two writes, 20 times as long as the first one took."""

Row = Mapping[str, Any]


class Cell:
    """The trials of one configuration and treatment, which differ in their seed."""

    def __init__(self, title: str, mode: str) -> None:
        self.title, self.mode = title, mode
        self.ended: dict[str, list[Row]] = {}
        self.running: dict[str, list[Row]] = {}

    def means(self, column: str) -> list[float]:
        """Over the trials that ended well, and as long as none has, over those that run.

        The curve ends with its shortest trial: a mean over fewer seeds would jump.
        """
        curves = list((self.ended or self.running).values())
        values = [[row.get(column) for row in rows] for rows in curves]
        return [_mean(epoch) for epoch in zip(*values, strict=False)]


def _mean(values: Sequence[Any]) -> float:
    known = [math.nan if value is None else float(value) for value in values]
    return statistics.fmean(known)


class ModeCurves(Callback):
    """Writes what belongs to the study as a whole: columns, layout, and the modes' curves."""

    def __init__(self, study_dir: Path, plan: Sequence[Mapping[str, Any]]) -> None:
        """``plan`` is that of study.json, and all of it. What has ended is read and written."""
        self._study_dir, self._root = study_dir, study_dir / "tensorboard"
        self._cells = cells_of(plan)
        for trial_id in self._cells:
            self._read(trial_id)
        write_study_run(study_dir, axes_of(plan), [cell.title for cell in self._cells.values()])
        modes = dict.fromkeys(cell.mode for cell in self._cells.values())
        folders = _folders(modes)
        # Before any trial's, and one after the other: the page gives neighbours unlike colours.
        self._files = {mode: RunFile(self._root / "modes" / folders[mode]) for mode in modes}
        self._stale = modes
        self._write()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        trial_id, epoch = trial.config["trial_id"], int(result["epoch"])
        cell = self._cells[trial_id]
        before = cell.running.get(trial_id, [])
        if epoch <= len(before):
            return  # a retry within this run reports its epochs again
        cell.running[trial_id] = [*before, dict(result)]
        if not cell.ended:
            self._stale[cell.mode] = None

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        trial_id = trial.config["trial_id"]
        self._cells[trial_id].running.pop(trial_id, None)
        self._read(trial_id)
        self._stale[self._cells[trial_id].mode] = None

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Comes after each of the others, and every 0.1 s."""
        if self._stale and time.monotonic() >= self._next_at:
            self._write()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self._write()

    def _read(self, trial_id: str) -> None:
        results = read_results(self._study_dir, trial_id)
        if results.get("status") in GOOD_STATUSES:
            rows = results["train"]["epochs"]
            drawn: list[Row] = [{column: row.get(column) for column in CHARTS} for row in rows]
            self._cells[trial_id].ended[trial_id] = drawn

    def _write(self) -> None:
        begun = time.monotonic()
        cells = list(dict.fromkeys(self._cells.values()))
        for mode in self._stale:
            points = [point for cell in cells if cell.mode == mode for point in _points(cell)]
            if points:
                self._files[mode].replace(points)
        self._stale = {}
        ended = time.monotonic()
        self._next_at = ended + (ended - begun) / WRITING_SHARE


def _points(cell: Cell) -> Iterator[tuple[int, Summary]]:
    for column in CHARTS:
        for epoch, mean in enumerate(cell.means(column), start=1):
            if math.isfinite(mean):
                yield epoch, scalar(_tag(cell.title, column), mean)


def _tag(title: str, column: str) -> str:
    return f"modes/{title}/{column}"


def cells_of(plan: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    """By trial id; the trials of a cell share it.

    A configuration's title is what differs among those of the plan, a treatment's its name.
    """
    titles = names.configurations([names.settings(entry) for entry in plan])
    cells: dict[tuple[str, str], Cell] = {}
    found = {}
    for entry, title in zip(plan, titles, strict=True):
        mode = str(names.treatment(entry))
        new = Cell(title.replace("/", "_"), mode)
        found[entry["trial_id"]] = cells.setdefault((title, mode), new)
    return found


def _folders(modes: Iterable[str]) -> dict[str, str]:
    """A treatment's name as that of a run, a folder: patterns may hold what no folder can."""
    found: dict[str, str] = {}
    for mode in modes:
        folder = re.sub(r"[^\w ,.=-]", "_", mode)[:100].strip(" .") or "_"
        while folder in found.values():
            folder += "_"
        found[mode] = folder
    return found


def write_study_run(study_dir: Path, axes: Sequence[Axis], titles: Sequence[str] = ()) -> None:
    """The run ``tensorboard/study``: the columns of HParams and the layout of Custom Scalars."""
    summaries = [(0, experiment(axes))]
    if titles:
        layout = {
            title: {
                heading: ["Multiline", [f"^{re.escape(_tag(title, column))}$"]]
                for column, heading in CHARTS.items()
            }
            for title in dict.fromkeys(titles)
        }
        summaries.append((0, custom_scalars(layout)))
    replace_run(study_dir / "tensorboard" / "study", summaries)
