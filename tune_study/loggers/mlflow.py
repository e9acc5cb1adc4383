"""Trials as MLflow runs: ``MLFLOW_TRACKING_URI``, or a SQLite file in the study folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from tune_study.errors import UserError
from tune_study.folder.schema import PLANNED_ENDS
from tune_study.loggers.trackers import plainly

STORAGE_FILE = "mlflow.sqlite3"
ERRORS = (MlflowException, SQLAlchemyError)
"""MLflow hides the second behind the first, but not while it connects."""
_STUDY, _TRIAL, _STATUS, _ERROR = (
    f"tune_study.{name}" for name in ("study", "trial_id", "status", "error")
)
_PARAMS_PER_BATCH = 100
_LONGEST_PARAM = 6000
"""Limits of MLflow's."""


def connect(study_dir: Path, created: str) -> MLflowRuns:
    """The study is an experiment of its name. Raises ``UserError`` when MLflow can't be reached."""
    for name in ("mlflow", "alembic"):  # they tell of every table that they create
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        client = MlflowClient(uri or f"sqlite:///{study_dir / STORAGE_FILE}")
        found = client.get_experiment_by_name(study_dir.name)
        experiment = (
            client.create_experiment(study_dir.name, _artifacts(uri, study_dir))
            if found is None
            else found.experiment_id
        )
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(experiment)
        return MLflowRuns(client, experiment, created)
    except ERRORS as error:
        where = "MLFLOW_TRACKING_URI" if uri else str(study_dir / STORAGE_FILE)
        raise UserError(
            f"--log mlflow: {where} can't be used ({plainly(error)}); mend it, or leave --log out"
        ) from None


def _artifacts(uri: str | None, study_dir: Path) -> str | None:
    """Nothing is stored there; unless told, MLflow would name the current folder."""
    return None if uri else (study_dir / "mlflow-artifacts").as_uri()


class MLflowRuns:
    """A run per trial, found by the study's creation time and the trial's id."""

    name = "mlflow"
    errors = ERRORS

    def __init__(self, client: MlflowClient, experiment_id: str, created: str) -> None:
        self._client, self._experiment, self._created = client, experiment_id, created
        self._runs: dict[str, str] = {}
        self._epochs: dict[str, int] = {}
        self._status: dict[str, str] = {}
        token: str | None = None
        while token != "":
            page = client.search_runs(
                [experiment_id], f"tags.`{_STUDY}` = '{created}'", page_token=token
            )
            for run in page:
                self._adopt(run)
            token = page.token or ""

    def _adopt(self, run: Run) -> None:
        trial_id = run.data.tags[_TRIAL]
        self._runs[trial_id] = run.info.run_id
        self._epochs[trial_id] = int(run.data.metrics.get("epoch", 0))
        if run.info.status in ("FINISHED", "FAILED"):
            self._status[trial_id] = run.data.tags.get(_STATUS, "")

    def status(self, trial_id: str) -> str | None:
        return self._status.get(trial_id)

    def start(self, trial_id: str, params: Mapping[str, Any]) -> int:
        self._status.pop(trial_id, None)
        if trial_id in self._runs:
            self._client.update_run(self._runs[trial_id], status="RUNNING")
            return self._epochs[trial_id]
        tags = {_STUDY: self._created, _TRIAL: trial_id}
        run = self._client.create_run(self._experiment, tags=tags, run_name=trial_id)
        self._runs[trial_id], self._epochs[trial_id] = run.info.run_id, 0
        texts = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in params.items()]
        for start in range(0, len(texts), _PARAMS_PER_BATCH):
            some = texts[start : start + _PARAMS_PER_BATCH]
            self._client.log_batch(run.info.run_id, params=some, synchronous=True)
        return 0

    def epoch(self, trial_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        self._log(trial_id, epoch, {**metrics, "epoch": epoch})
        self._epochs[trial_id] = epoch

    def end(self, trial_id: str, status: str, metrics: Mapping[str, float], error: str) -> None:
        tags = {_STATUS: status, _ERROR: error}
        self._log(trial_id, self._epochs[trial_id], metrics, tags)
        # MLflow has no word for a trial that goes on later but this one.
        words = {"interrupted": "KILLED", **dict.fromkeys(PLANNED_ENDS, "FINISHED")}
        self._client.set_terminated(self._runs[trial_id], words.get(status, "FAILED"))
        self._status[trial_id] = status

    def _log(
        self,
        trial_id: str,
        step: int,
        metrics: Mapping[str, float],
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """In one transaction."""
        now = time.time_ns() // 10**6
        self._client.log_batch(
            self._runs[trial_id],
            metrics=[Metric(key, value, now, step) for key, value in metrics.items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
            synchronous=True,
        )

    def close(self) -> None:
        """Everything is written already."""
