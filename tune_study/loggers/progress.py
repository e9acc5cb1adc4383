"""What the user sees while a study runs: a live display in a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from tune_study.cluster.callbacks import Callback
from tune_study.folder.names import told_apart
from tune_study.folder.results import read_results
from tune_study.folder.schema import GOOD_STATUSES


class Progress(Callback):
    """Tune's callbacks, shown. Use as a context manager around the run."""

    def __init__(
        self,
        console: Console,
        study_dir: Path,
        total: int,
        done: int,
        epochs: dict[str, int],
        plan: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """``total`` and ``done`` count trials; ``epochs`` is the most epochs of each trial.

        By ``plan``, as in study.json, trials are told apart in words where their ids do not.
        """
        self._short, self._beside = told_apart(plan)
        self._console = console
        self._study_dir = study_dir
        self._epochs = epochs
        self._total, self._done, self._done_before, self._failed = total, done, done, 0
        self._running: dict[str, dict[str, Any]] = {}
        self._said: set[tuple[str, str]] = set()
        self._started = time.monotonic()
        self._epochs_left = sum(epochs.values())
        self._epochs_seen = 0
        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._task = self._bar.add_task("trials", total=total, completed=done)
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=2)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def expect(self, trial_id: str, epochs: int) -> None:
        """A trial that was not planned at the start: a search has suggested it."""
        if trial_id not in self._epochs:
            self._epochs[trial_id] = epochs
            self._epochs_left += epochs

    def say(self, line: str) -> None:
        """One line above the live display, or in the log."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        self._running[trial_id] = {"epoch": 0, "accuracy": None, "since": time.monotonic()}
        if not self._live:
            self.say(f"{self._name(trial_id)}: started")
        self._update()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        trial_id, epoch = trial.config["trial_id"], int(result["epoch"])
        state = self._running.setdefault(
            trial_id, {"epoch": 0, "accuracy": None, "since": time.monotonic()}
        )
        self._epochs_left -= max(0, epoch - state["epoch"])
        self._epochs_seen += 1
        state |= {"epoch": epoch, "accuracy": result["val_accuracy"]}
        if not self._live:
            self.say(
                f"{self._name(trial_id)}: epoch {epoch}/{self._epochs[trial_id]}, "
                f"loss {result['train_loss']:.4f}, "
                f"validation accuracy {result['val_accuracy']:.4f}" + _speed(result)
            )
        self._update()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        state = self._running.pop(trial_id, {"epoch": 0})
        name, count = self._name(trial_id), f"[{self._done + 1}/{self._total}]"
        results = read_results(self._study_dir, trial_id)
        status = results.get("status", "pending")  # its worker died before it wrote anything
        for sentence in results.get("warnings", []):
            if (trial_id, sentence) not in self._said:
                self._said.add((trial_id, sentence))
                self.say(f"{name}: {sentence}")
        if status in ("interrupted", "pending"):
            self._update()
            return
        self._epochs_left -= self._epochs[trial_id] - state["epoch"]
        self._done += 1
        if status in GOOD_STATUSES:
            test = results["train"]["test_metrics"]["test_accuracy"]
            self.say(f"{name}: {status}, test accuracy {test:.4f} {count}")
        elif status == "pruned":
            self.say(f"{name}: {results['error']} {count}")
        else:
            self._failed += 1
            self.say(f"{name}: {status}: {results.get('error')} {count}")
        self._update()

    on_trial_error = on_trial_complete

    def _name(self, trial_id: str) -> str:
        """The id, by which a log is searched, and in words what it leaves out."""
        beside = self._beside.get(trial_id)
        return f"{trial_id} ({beside})" if beside else trial_id

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._done)

    def _left(self) -> str:
        if not self._epochs_seen:
            return "time left unknown until the first epoch ends"
        unplanned = self._total - self._done_before - len(self._epochs)
        left = self._epochs_left + unplanned * sum(self._epochs.values()) / len(self._epochs)
        seconds = (time.monotonic() - self._started) / self._epochs_seen * left
        return f"about {duration(seconds)} left"

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for heading in ("running", "epoch", "validation accuracy", "for"):
            table.add_column(heading)
        for trial_id, state in self._running.items():
            accuracy = "" if state["accuracy"] is None else f"{state['accuracy']:.4f}"
            table.add_row(
                self._short.get(trial_id, trial_id),
                f"{state['epoch']}/{self._epochs[trial_id]}",
                accuracy,
                duration(time.monotonic() - state["since"]),
            )
        summary = Text(f"{self._done} done, {self._failed} failed; {self._left()}")
        return Group(table, self._bar, summary)


def _speed(result: dict[str, Any]) -> str:
    """A simulated trial has none."""
    speed = result["images_per_s"]
    return "" if math.isnan(speed) else f", {speed:.0f} images/s"


def duration(seconds: float) -> str:
    """``3 h 20 min``, ``12 min``, ``40 s``."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{round(seconds / 60)} min" if seconds >= 90 else f"{seconds:.0f} s"
