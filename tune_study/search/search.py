"""A search: Optuna suggests the trials, Tune schedules them, our files say how they ended.

Optuna's study lies in ``<study>/optuna.sqlite3`` and nothing else of it is kept, so a killed search
continues with all it learned. A trial that was running is still "running" there: it is run on from
its own checkpoint under the same number, and told when it ends. The sampler is seeded anew for
every trial, so that the next suggestion depends on the seed and on what was learned alone: with one
trial at a time, a search that was killed suggests what the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import DatabaseError

from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line
from tune_study.folder.files import read_json, write_json
from tune_study.folder.results import measured, read_results
from tune_study.folder.schema import FINISHED_STATUSES, GOOD_STATUSES
from tune_study.folder.store import Store, plainly
from tune_study.loggers.progress import Progress
from tune_study.search.settings import Settings, asked, distributions_of, probes
from tune_study.trial.context import RunContext

STORAGE_FILE = "optuna.sqlite3"


class Ended(NamedTuple):
    """How a trial ended, in Optuna's words; ``values`` only of a complete one."""

    state: TrialState
    values: list[float] | None = None


def outcome(results: Mapping[str, Any], objectives: Sequence[str]) -> Ended | None:
    """What a results.json tells Optuna; ``None`` while the trial is still to be continued.

    An objective that is missing or NaN makes it a failed trial: Optuna accepts no NaN.
    """
    status = results.get("status")
    if status not in FINISHED_STATUSES:
        return None
    if status == "pruned":
        return Ended(TrialState.PRUNED)
    row = measured(results)
    values = [row.get(name) for name in objectives]
    if status not in GOOD_STATUSES or not all(_finite(value) for value in values):
        return Ended(TrialState.FAIL)
    return Ended(TrialState.COMPLETE, [float(value) for value in values if value is not None])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def open_storage(study_dir: Path) -> optuna.storages.RDBStorage:
    """The SQLite file of the search. Raises ``UserError`` when it is no such thing."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = study_dir / STORAGE_FILE
    try:
        return optuna.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
    except (DatabaseError, RuntimeError) as error:
        raise UserError(
            f"--name {study_dir.name}: {path} is no study of Optuna's ({first_line(error)}); "
            "remove it, and the search learns anew from the trials' own files"
        ) from None


def _first_unlike(
    before: Sequence[BaseDistribution], now: Sequence[BaseDistribution]
) -> BaseDistribution | None:
    """Of ``now``. A range may depend on other answers: then there are several, all of them fine."""
    for distribution in now:
        if _fixed(distribution) != _fixed(before[0]):
            return distribution
    return now[0] if len(before) == len(now) == 1 and before != now else None


def _fixed(distribution: BaseDistribution) -> list[Any]:
    """What Optuna lets no parameter change: kind, choices, scale."""
    return [type(distribution), *(getattr(distribution, name, None) for name in ("choices", "log"))]


def _shown(distribution: BaseDistribution) -> str:
    """Its choices, or what it is in Optuna's words."""
    choices = getattr(distribution, "choices", None)
    return ", ".join(map(str, choices)) if choices is not None else str(distribution)


class Search:
    """One search in its study folder. ``trials`` is the plan, which grows as Optuna suggests."""

    def __init__(
        self, settings: Settings, context: RunContext, trials: Sequence[TrialConfig]
    ) -> None:
        self.settings, self.context = settings, context
        self.trials = list(trials)
        self.problem: UserError | None = None
        self._store: Store | None = None
        self._progress: Progress | None = None
        self.storage = open_storage(context.study_dir)
        self._refuse_changed_space()
        self._refuse_edited_space()

    def _refuse_changed_space(self) -> None:
        """Optuna itself would notice other choices only when it asks for the next trial."""
        begun = distributions_of(
            trial
            for study in self.storage.get_all_studies()
            for trial in self.storage.get_all_trials(study._study_id, deepcopy=False)
        )
        for name, now in asked(self.settings).items():
            before = begun.get(name, [])
            if before and (changed := _first_unlike(before, now)):
                raise UserError(
                    f"--space {self.settings.space}: {name} is not asked as when this search began "
                    f"(then {_shown(before[0])}, now {_shown(changed)}); put it back to continue, "
                    "or choose another --name"
                )

    def _refuse_edited_space(self) -> None:
        params = self.params()
        for trial in self.trials:
            config = self.settings.config(optuna.trial.FixedTrial(params[trial.trial_id]))
            if config != trial:
                raise UserError(
                    f"--space {self.settings.space}: it is not what this search began with (for "
                    f"{trial.trial_id} it now means {config.trial_id}); choose another --name"
                )

    def params(self) -> dict[str, dict[str, Any]]:
        """What was suggested, by trial id."""
        return (read_json(self.context.study_dir / "study.json") or {})["search"]["params"]

    @property
    def planned(self) -> int:
        """How many trials there will be; a study can have more than this command asks for."""
        return max(self.settings.num_samples, len(self.trials))

    def ended(self, trial: TrialConfig) -> Ended | None:
        results = read_results(self.context.study_dir, trial.trial_id)
        return outcome(results, self.settings.objectives)

    def begin(self, progress: Progress, store: Store | None = None) -> None:
        """Who is told of new trials; where those on a cluster leave their results."""
        self._progress = progress
        self._store = store if self.context.on_cluster else None

    def pull(self, trial: TrialConfig) -> None:
        """On a cluster: what a node has pushed of the trial, before anything is made of it."""
        if self._store is not None:
            with plainly():
                self._store.pull(trial.trial_id)

    def push(self, trial: TrialConfig) -> None:
        """On a cluster: what the command itself says of the trial."""
        if self._store is not None:
            with plainly():
                self._store.push(trial.trial_id)

    @property
    def expected(self) -> list[TrialConfig]:
        """The trials so far, and draws from the space: models and data that may be asked for."""
        return [*self.trials, *probes(self.settings)]

    def say(self, line: str) -> None:
        assert self._progress is not None
        self._progress.say(line)

    def expect(self, trial: TrialConfig) -> None:
        if self._progress is not None:
            self._progress.expect(trial.trial_id, trial.training.num_train_epochs)

    def drawn(self) -> list[dict[str, Any]]:
        """Cells as in a plan that differ in all that the space asks: TensorBoard's columns."""
        return [trial.model_dump(mode="json") for trial in probes(self.settings)]

    def plan(self, trial: TrialConfig, params: dict[str, Any]) -> None:
        """Adds a suggested trial to study.json, before it starts."""
        path = self.context.study_dir / "study.json"
        manifest = read_json(path) or {}
        cell = {"trial_id": trial.trial_id, **trial.model_dump(mode="json")}
        manifest["plan"].append(cell)
        manifest["search"]["params"][trial.trial_id] = params
        write_json(path, manifest)
        self.trials.append(trial)
