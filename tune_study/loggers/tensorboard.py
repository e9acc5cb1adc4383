"""TensorBoard: one run per trial under a readable name, comparable while it still runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.logger import TBXLoggerCallback

from tune_study.folder.results import measured, read_results
from tune_study.folder.schema import FINISHED_STATUSES, PLANNED_ENDS
from tune_study.loggers import hparams
from tune_study.loggers.hparams import Axis

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

SCALARS = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/validation",
    "learning_rate": "optimizer/learning_rate",
    "images_per_s": "speed/images_per_s",
    "epoch_time_s": "speed/epoch_time_s",
    "grad_norm_mean": "gradients/norm_mean",
    "grad_norm_std": "gradients/norm_std",
    "grad_norm_max": "gradients/norm_max",
    "grad_explosions": "gradients/explosions",
    "grad_vanishing_layers": "gradients/vanishing_layers",
    "loss_spikes": "gradients/loss_spikes",
    "gradient_cosine_successive": "gradients/cosine_successive",
    "stability_score": "gradients/stability_score",
    "rss_bytes": "resources/rss_bytes",
    "system_memory_used_bytes": "resources/system_memory_used_bytes",
    "cpu_cores_used": "resources/cpu_cores_used",
    "gpu_memory_bytes": "resources/gpu_memory_bytes",
    "best_val_accuracy": "compare/best_val_accuracy",
    "weights_bytes": "compare/weights_MB",
    "peak_train_bytes": "compare/peak_train_MB",
    "activation_bytes": "compare/activation_MB",
    "quantization_error": "compare/quantization_error",
    "gradient_cosine_start": "compare/gradient_cosine_start",
    "feature_cosine": "compare/feature_cosine",
    "grad_norm_cv": "compare/grad_norm_cv",
}
"""By a report's column. Tags in MB (10^6 bytes): the page would print 1.4862e+8 bytes."""
FINAL = {
    "test_accuracy": "compare/test_accuracy",
    "test_loss": "compare/test_loss",
    **{name: tag for name, tag in SCALARS.items() if tag.startswith("compare/")},
}
"""By a column of the trials table, at the end, as far as no epoch has shown it."""


class TensorBoardCallback(TBXLoggerCallback):
    """Tune's TensorBoard logger, with three differences.

    It writes into ``<study>/tensorboard/<trial_id>``, at once, where Tune's own stages the files
    and copies them later. It begins each trial anew and gets its earlier epochs from the trial, so
    that no epoch appears twice after a restart. And it writes the hyperparameters at the start, so
    that HParams compares running trials too: ``axes``, the same for every trial of a study. What
    belongs to no trial is ``mode_curves``'.
    """

    def __init__(self, study_dir: Path, axes: Sequence[Axis]) -> None:
        super().__init__()
        self._study_dir = study_dir
        self._axes = axes
        self._last_epoch: dict[Trial, int] = {}
        self._shown: dict[Trial, set[str]] = {}

    def log_trial_start(self, trial: Trial) -> None:
        if trial in self._trial_writer:
            self._trial_writer.pop(trial).close()
        trial_id = trial.config["trial_id"]
        folder = self._study_dir / "tensorboard" / trial_id
        shutil.rmtree(folder, ignore_errors=True)
        writer = self._summary_writer_cls(str(folder), flush_secs=5)
        self._trial_writer[trial] = writer
        self._last_epoch[trial] = 0
        self._shown[trial] = set()
        start = hparams.session_start(trial_id, trial.config["trial"], self._axes)
        writer.file_writer.add_summary(start)
        writer.flush()

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        if trial not in self._trial_writer:
            self.log_trial_start(trial)
        epoch = int(result.get("epoch", 0))
        if epoch <= self._last_epoch[trial]:
            return  # a retry within this run reports its epochs again
        self._last_epoch[trial] = epoch
        self._add_scalars(trial, SCALARS, result, epoch)
        self._trial_writer[trial].flush()

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        if trial not in self._trial_writer:
            return
        row = measured(read_results(self._study_dir, trial.config["trial_id"]))
        epoch = self._last_epoch.pop(trial)
        rest = {name: tag for name, tag in FINAL.items() if tag not in self._shown[trial]}
        self._add_scalars(trial, rest, row, epoch)
        del self._shown[trial]
        writer = self._trial_writer.pop(trial)
        if row.get("status") in FINISHED_STATUSES:  # else it is to be continued
            end = hparams.session_end(failed=row["status"] not in PLANNED_ENDS)
            writer.file_writer.add_summary(end)
        writer.close()

    def _add_scalars(
        self, trial: Trial, tags: Mapping[str, str], values: Mapping[str, Any], epoch: int
    ) -> None:
        for name, tag in tags.items():
            value = values.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                scaled = value / 1e6 if tag.endswith("_MB") else value
                self._trial_writer[trial].add_scalar(tag, scaled, global_step=epoch)
                self._shown[trial].add(tag)
