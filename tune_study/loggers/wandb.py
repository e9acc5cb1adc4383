"""Trials as Weights & Biases runs, online or with ``WANDB_MODE=offline``."""

from __future__ import annotations

import hashlib
import netrc
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from tune_study.errors import UserError
from tune_study.folder.files import read_json, write_json
from tune_study.folder.schema import PLANNED_ENDS

STATUS_FILE = "wandb-runs.json"
"""Which trials have been written to their end: {trial_id: status}."""


def connect(study_dir: Path, created: str) -> WandbRuns:
    """The study is a project of its name. Raises ``UserError`` without a key.

    Otherwise W&B would ask for it, and write it into a file.
    """
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "offline"):
        raise UserError(f"--log wandb: WANDB_MODE={mode}; set it to online or offline")
    if mode == "online" and not _has_key():
        raise UserError(
            "--log wandb: there is no key; set WANDB_API_KEY, or WANDB_MODE=offline, or leave "
            "--log out"
        )
    return WandbRuns(study_dir, created, offline=mode == "offline")


def _has_key() -> bool:
    """In the environment, or in the file of an earlier ``wandb login``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRuns:
    """A run per trial, whose id is a hash of the study's creation time and the trial's id."""

    name = "wandb"
    errors = (wandb.Error,)

    def __init__(self, study_dir: Path, created: str, *, offline: bool) -> None:
        self._study_dir, self._created, self._offline = study_dir, created, offline
        found = read_json(study_dir / STATUS_FILE)
        self._status: dict[str, str] = found if isinstance(found, dict) else {}
        self._runs: dict[str, Any] = {}

    def status(self, trial_id: str) -> str | None:
        return self._status.get(trial_id)

    def start(self, trial_id: str, params: Mapping[str, Any]) -> int:
        if trial_id in self._runs:  # its worker died
            self._runs.pop(trial_id).finish(exit_code=1)
        run_id = hashlib.sha256(f"{self._created} {trial_id}".encode()).hexdigest()[:16]
        if self._offline:  # the trial reports its earlier epochs again, and nothing can be resumed
            for old in (self._study_dir / "wandb").glob(f"offline-run-*-{run_id}"):
                shutil.rmtree(old)
        self._runs[trial_id] = run = wandb.init(
            project=self._study_dir.name,
            id=run_id,
            name=trial_id,
            config=dict(params),
            dir=str(self._study_dir),
            resume=None if self._offline else "allow",
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True
            ),
        )
        return 0 if self._offline else max(0, run.starting_step - 1)

    def epoch(self, trial_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        self._runs[trial_id].log(dict(metrics), step=epoch, commit=True)

    def end(self, trial_id: str, status: str, metrics: Mapping[str, float], error: str) -> None:
        run = self._runs.pop(trial_id)
        run.summary.update({**metrics, "status": status, **({"error": error} if error else {})})
        run.finish(exit_code=0 if status in PLANNED_ENDS else 1)
        if status != "interrupted":
            self._status[trial_id] = status
            write_json(self._study_dir / STATUS_FILE, self._status)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish(exit_code=1)
        self._runs.clear()
