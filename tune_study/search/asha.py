"""Tune's ASHA for a search that may be killed: which trials are not worth their further epochs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tune_study.cluster.stop import Gate
from tune_study.config import TrialConfig
from tune_study.folder.files import mapping, write_json
from tune_study.folder.results import read_results
from tune_study.search.search import Search
from tune_study.trial import simulate
from tune_study.trial.context import RunContext

REDUCTION = 3
"""A trial goes on at epochs 1, 3, 9, ... when it is among the best third of those seen there."""


class Asha(Gate, AsyncHyperBandScheduler):
    """ASHA on the validation accuracy, which also knows the epochs of earlier runs.

    A trial that it stops has the status ``pruned``: nothing went wrong, and it is not continued.
    """

    def __init__(self, search: Search) -> None:
        super().__init__(
            time_attr="epoch",
            metric="val_accuracy",
            mode="max",
            max_t=max(trial.training.num_train_epochs for trial in search.expected),
            grace_period=1,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
        )
        self._search = search
        for trial in search.trials:
            self._remember(trial)

    def _remember(self, trial: TrialConfig) -> None:
        results = read_results(self._search.context.study_dir, trial.trial_id)
        rows = mapping(results, "train").get("epochs", [])
        earlier: Any = SimpleNamespace(trial_id=trial.trial_id)
        controller: Any = None
        self.on_trial_add(controller, earlier)
        for row in rows:
            super().on_trial_result(controller, earlier, row)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        config = TrialConfig.model_validate(trial.config["trial"])
        if result["epoch"] >= config.training.num_train_epochs:
            return TrialScheduler.CONTINUE  # only the test is left
        # Ours and not Tune's name: a trial that is continued has stood at the earlier rungs.
        own: Any = SimpleNamespace(trial_id=config.trial_id)
        self._trial_info.setdefault(config.trial_id, self._brackets[0])
        decision = super().on_trial_result(tune_controller, own, result)
        if decision == TrialScheduler.STOP:
            self._search.pull(config)  # its epochs, which it pushes before it reports them
            mark_pruned(config, self._search.context, int(result["epoch"]))
            self._search.push(config)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._trial_info.pop(trial.trial_id, None)  # its last epoch has been seen


def mark_pruned(config: TrialConfig, context: RunContext, epoch: int) -> None:
    """In the trial's results.json, while its worker waits for Tune's answer to that epoch."""
    results = read_results(context.study_dir, config.trial_id)
    if context.simulation is not None:
        results = simulate.results_of(config, context.simulation, epochs=epoch)
    sentence = f"stopped by ASHA after epoch {epoch}: other trials did better at that epoch"
    path = context.study_dir / config.trial_id / "results.json"
    write_json(path, {**results, "status": "pruned", "error": sentence})
