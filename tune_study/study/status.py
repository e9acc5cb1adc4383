"""What has ended in a study, and what a command would do in it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tune_study.config import TrialConfig
from tune_study.folder.results import status_of
from tune_study.folder.schema import FINISHED_STATUSES, PLANNED_ENDS
from tune_study.study import manifest
from tune_study.trial.context import RunContext

NEW, PLANNED, CONTINUED, FINISHED = "new", "planned", "to continue", "finished"


class Extension(NamedTuple):
    """A command held against the study in its folder."""

    states: dict[str, str]
    """By trial id, of the trials that the command names: ``finished``, ``to continue``,
    ``planned`` (and not begun), ``new``, ``failed (oom)``, ``again (oom)``."""
    others: int
    """Trials of the study that the command does not name: they stay as they are."""

    @property
    def to_run(self) -> list[str]:
        """The ids of the trials that the command runs."""
        return [trial for trial, state in self.states.items() if _runs(state)]

    @property
    def sentence(self) -> str:
        """What is run and what stays."""
        counts = Counter(self.states.values())
        failed = sum(n for state, n in counts.items() if state.startswith("failed"))
        running = [f"{n} {state}" for state, n in counts.items() if _runs(state)]
        staying = [f"{counts[FINISHED]} finished"] if counts[FINISHED] else []
        if failed:
            staying.append(f"{failed} failed (--retry-failed runs them again)")
        if self.others:
            staying.append(f"{self.others} that this command does not name")
        rest = f"; {', '.join(staying)} stay as they are" if staying else ""
        return f"{len(self.to_run)} to run" + (f": {', '.join(running)}" if running else "") + rest


def _runs(state: str) -> bool:
    return not state.startswith(("failed", FINISHED))


def held_against(
    trials: Sequence[TrialConfig],
    planned: Collection[str],
    study_dir: Path,
    *,
    retry_failed: bool = False,
) -> Extension:
    """``trials`` against the study in ``study_dir``, whose plan has the ids ``planned``."""
    states = {}
    for trial_id, status in statuses(trials, study_dir).items():
        if status in PLANNED_ENDS:
            state = FINISHED
        elif status in FINISHED_STATUSES:
            state = f"{'again' if retry_failed else 'failed'} ({status})"
        elif status == "interrupted":
            state = CONTINUED
        else:
            state = PLANNED if trial_id in planned else NEW
        states[trial_id] = state
    return Extension(states, len(set(planned) - states.keys()))


def extension_of(
    trials: Sequence[TrialConfig], context: RunContext, retry_failed: bool
) -> Extension | None:
    """What the command does in the study that is in its folder; ``None`` where there is none."""
    planned = manifest.planned_ids(context.study_dir)
    if not planned:
        return None
    return held_against(trials, planned, context.study_dir, retry_failed=retry_failed)


def statuses(trials: Iterable[TrialConfig], study_dir: Path) -> dict[str, str]:
    """{trial_id: status}, by our own files alone."""
    return {trial.trial_id: status_of(study_dir, trial.trial_id) for trial in trials}


def todo(trials: Sequence[TrialConfig], study_dir: Path) -> list[TrialConfig]:
    """The trials that are still to be run, or to be continued."""
    found = statuses(trials, study_dir)
    return [trial for trial in trials if found[trial.trial_id] not in FINISHED_STATUSES]


def forget(trials: Iterable[TrialConfig], study_dir: Path) -> None:
    """Removes what failed trials left, so that they start from the beginning."""
    found = statuses(trials, study_dir)
    for trial_id, status in found.items():
        if status in FINISHED_STATUSES and status not in PLANNED_ENDS:
            for folder in [study_dir / trial_id, *study_dir.glob(f"run-*/{trial_id}")]:
                shutil.rmtree(folder, ignore_errors=True)
