"""What Optuna suggests next: Tune's ``OptunaSearch`` with a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from tune_study.cluster.stop import Gate, Stop
from tune_study.config import TrialConfig
from tune_study.errors import UserError
from tune_study.folder.files import mapping
from tune_study.folder.results import read_results
from tune_study.search.asha import Asha
from tune_study.search.importance import write_importances
from tune_study.search.search import Ended, Search
from tune_study.search.settings import OBJECTIVES
from tune_study.trial.known import known_of

STUDY_NAME = "search"
"""The same in every folder, which may be renamed."""
_MOST_REPEATS = 50
"""Suggestions in a row that are known already: then the space has no more to offer."""


class Suggestions(OptunaSearch):
    """Tune's ``OptunaSearch`` with a study that outlives the process.

    Values come from the trials' own files rather than from the last report to Tune.
    """

    def __init__(self, search: Search) -> None:
        super().__init__(
            space=lambda trial: search.settings.config(trial).model_dump(mode="json"),
            metric=list(search.settings.objectives),
            mode=[OBJECTIVES[name][:3] for name in search.settings.objectives],
            storage=search.storage,
            study_name=STUDY_NAME,
            sampler=optuna.samplers.TPESampler(),
        )
        self._search = search
        self._live: dict[str, tuple[Trial, TrialConfig]] = {}
        self._last_step: dict[str, int] = {}
        self._interrupted: list[tuple[FrozenTrial, TrialConfig]] = []
        self._adopt()

    @property
    def metric(self) -> None:  # type: ignore[override]
        """Tune shall not look for our objectives in the reports."""
        return None

    @property
    def study(self) -> optuna.Study:
        assert self._ot_study is not None
        return self._ot_study

    def _adopt(self) -> None:
        """Settles what Optuna holds with what our files say, whatever happened in between."""
        self._complete_the_plan()
        planned = {trial.trial_id: trial for trial in self._search.trials}
        known: dict[str, set[TrialState]] = {}
        for frozen in self.study.get_trials(deepcopy=False):
            trial_id = frozen.user_attrs.get("trial_id")
            state = frozen.state
            if state == TrialState.RUNNING and trial_id not in planned:
                # Killed between question and plan: it is asked again, under another number.
                self.study.tell(frozen.number, state=TrialState.FAIL)
            elif trial_id in planned:
                known.setdefault(trial_id, set()).add(state)
                if state == TrialState.RUNNING:
                    if (ended := self._search.ended(planned[trial_id])) is None:
                        self._interrupted.append((frozen, planned[trial_id]))
                    else:
                        self._tell(frozen.number, ended)
        for trial_id, trial in planned.items():
            self._remind(trial, known.get(trial_id, set()))

    def _complete_the_plan(self) -> None:
        """What was suggested and is missing in study.json, after a kill or a lost file."""
        planned = {trial.trial_id for trial in self._search.trials}
        for frozen in self.study.get_trials(deepcopy=False):
            trial_id = frozen.user_attrs.get("trial_id")
            if trial_id and trial_id not in planned and frozen.state != TrialState.WAITING:
                config = self._search.settings.config(optuna.trial.FixedTrial(frozen.params))
                planned.add(config.trial_id)
                self._search.plan(config, frozen.params)

    def _remind(self, trial: TrialConfig, states: set[TrialState]) -> None:
        """A planned trial that Optuna has lost, or that is to be run again, is given back to it."""
        if states & {TrialState.RUNNING, TrialState.WAITING}:
            return
        params = self._search.params()
        attributes = {"trial_id": trial.trial_id}
        ended = self._search.ended(trial)
        if ended is None:
            self.study.enqueue_trial(params[trial.trial_id], user_attrs=attributes)
        elif not states:
            asked = optuna.trial.FixedTrial(params[trial.trial_id])
            self._search.settings.config(asked)
            pruned = ended.state == TrialState.PRUNED
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=ended.state,
                    values=ended.values,
                    params=asked.params,
                    distributions=asked.distributions,
                    user_attrs=attributes,
                    intermediate_values=self._epochs(trial) if pruned else None,
                )
            )

    def _epochs(self, trial: TrialConfig) -> dict[int, float]:
        results = read_results(self._search.context.study_dir, trial.trial_id)
        epochs = mapping(results, "train").get("epochs", [])
        return {row["epoch"]: row["val_accuracy"] for row in epochs}

    def suggest(self, trial_id: str) -> Any:
        """The next trial for Tune, whose own name for it is ``trial_id``."""
        if Stop.requested() or self._search.problem is not None:
            return Searcher.FINISHED
        if self._interrupted:
            frozen, config = self._interrupted.pop(0)
            return self._start(trial_id, Trial(self.study, frozen._trial_id), config)
        for repeats in range(_MOST_REPEATS):
            if not self._may_ask():
                return Searcher.FINISHED
            try:
                trial, config = self._ask(repeats)
            except UserError as error:
                self._search.problem = error
                return Searcher.FINISHED
            if any(config == other for _, other in self._live.values()):
                self.study.tell(trial, state=TrialState.FAIL)  # it is running under another number
            elif (ended := self._search.ended(config)) is not None:
                self._tell(trial.number, ended)  # suggested before: what came of it is known
            else:
                return self._start(trial_id, trial, config)
        self._search.say(
            f"the last {_MOST_REPEATS} suggestions were all known: the space has no more to offer, "
            f"so the search ends after {len(self._search.trials)} trials"
        )
        return Searcher.FINISHED

    def _may_ask(self) -> bool:
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return bool(waiting) or len(self._search.trials) < self._search.settings.num_samples

    def _ask(self, repeats: int) -> tuple[Trial, TrialConfig]:
        words = [self._search.settings.seed, len(self._search.trials), repeats]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = self.study.ask()
        try:
            config = self._search.settings.config(trial)
        except UserError:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        trial.set_user_attr("trial_id", config.trial_id)
        if all(config != planned for planned in self._search.trials):
            self._search.plan(config, trial.params)
        return trial, config

    def _start(self, trial_id: str, trial: Trial, config: TrialConfig) -> dict[str, Any]:
        self._live[trial_id] = trial, config
        self._last_step[trial_id] = self.study.trials[trial.number].last_step or 0
        self._search.expect(config)
        told = {"trial_id": config.trial_id, "trial": config.model_dump(mode="json")}
        simulated = self._search.context.simulation is not None
        return {**told, "known": known_of(config)} if simulated else told

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna keeps the curve of a search with one objective; a trial goes on where it was."""
        epoch = int(result["epoch"])
        alone = self._search.settings.objectives == ("val_accuracy",)
        if alone and epoch > self._last_step[trial_id]:
            self._last_step[trial_id] = epoch
            self._live[trial_id][0].report(result["val_accuracy"], step=epoch)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial that was stopped, or whose worker died, stays running: it is continued.

        Tune calls it before all callbacks, and again when it fails: the store may not answer.
        """
        trial, config = self._live[trial_id]
        self._search.pull(config)
        del self._live[trial_id]
        ended = self._search.ended(config)
        if ended is not None:
            self._tell(trial.number, ended)

    def _tell(self, number: int, ended: Ended) -> None:
        self.study.tell(number, ended.values, state=ended.state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what Tune saves of a search is never read, and SQLite has it all."""
        Path(checkpoint_path).write_bytes(b"")


def tune_config(search: Search, max_concurrent: int) -> dict[str, Any]:
    """What Tune's ``TuneConfig`` gets: the suggestions, their number, and the scheduler."""
    gate: tune.schedulers.TrialScheduler = Gate()
    if search.settings.scheduler == "asha":
        gate = Asha(search)
    return {
        "search_alg": ConcurrencyLimiter(Suggestions(search), max_concurrent=max_concurrent),
        "num_samples": -1,  # the searcher says when it has finished
        "scheduler": gate,
    }


def finish(search: Search) -> None:
    """After the last trial of this run: search.json. Raises what stopped the search."""
    settings = search.settings
    write_importances(
        search.context.study_dir, Suggestions(search).study, settings.objectives, settings.seed
    )
    if search.problem is not None:
        raise search.problem
