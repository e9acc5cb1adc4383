"""TensorBoard: one run per trial under a readable name, comparable while it still runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.logger import TBXLoggerCallback
from tensorboardX.summary import hparams

from tune_study.files import read_json

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
    "weights_bytes": "compare/weights_bytes",
    "peak_train_bytes": "compare/peak_train_bytes",
    "activation_bytes": "compare/activation_bytes",
    "quantization_error": "compare/quantization_error",
    "gradient_cosine_start": "compare/gradient_cosine_start",
    "feature_cosine": "compare/feature_cosine",
    "grad_norm_cv": "compare/grad_norm_cv",
}
FINAL = {"test_accuracy": "compare/test_accuracy", "test_loss": "compare/test_loss"}
METRICS = [tag for tag in (*FINAL.values(), *SCALARS.values()) if tag.startswith("compare/")]
"""The metric columns of the HParams table, the same in every trial."""


_COLUMN_NAMES = {
    "quantization.mode": "quantization",
    "lora.r": "lora_r",
    "lora.lora_alpha": "lora_alpha",
}


class TensorBoardCallback(TBXLoggerCallback):
    """Tune's TensorBoard logger, with three differences.

    It writes into ``<study>/tensorboard/<trial_id>``, at once, where Tune's own stages the files
    and copies them later. It begins each trial anew and gets its earlier epochs from the trial, so
    that no epoch appears twice after a restart. And it writes the hyperparameters at the start, so
    that HParams compares running trials too: ``axes``, the same for every trial of a study.
    """

    def __init__(self, study_dir: Path, axes: Sequence[str]) -> None:
        """``axes`` are dotted fields of ``TrialConfig`` (see ``axes_of``)."""
        super().__init__()
        self._study_dir = study_dir
        self._axes = axes
        self._last_epoch: dict[Trial, int] = {}

    def log_trial_start(self, trial: Trial) -> None:
        if trial in self._trial_writer:
            self._trial_writer.pop(trial).close()
        folder = self._study_dir / "tensorboard" / trial.config["trial_id"]
        shutil.rmtree(folder, ignore_errors=True)
        writer = self._summary_writer_cls(str(folder), flush_secs=5)
        self._trial_writer[trial] = writer
        self._last_epoch[trial] = 0
        experiment, start, _ = _hparams(trial, self._axes)
        writer.file_writer.add_summary(experiment)
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
        results = read_json(self._study_dir / trial.config["trial_id"] / "results.json") or {}
        final = results.get("train", {}).get("test_metrics", {})
        self._add_scalars(trial, FINAL, final, self._last_epoch.pop(trial))
        writer = self._trial_writer.pop(trial)
        writer.file_writer.add_summary(_hparams(trial, self._axes)[2])
        writer.close()

    def _add_scalars(
        self, trial: Trial, tags: dict[str, str], values: dict[str, Any], epoch: int
    ) -> None:
        for name, tag in tags.items():
            value = values.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._trial_writer[trial].add_scalar(tag, value, global_step=epoch)


def axes_of(plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted fields in which the planned trials differ, and always mode and seed.

    TensorBoard shows only the first few columns of its table: constants would hide the axes.
    """
    flat = [_flatten(cell) for cell in plan]
    names = dict.fromkeys(name for cell in flat for name in cell if name != "trial_id")
    return [
        name
        for name in names
        if name in ("quantization.mode", "seed") or len({str(cell.get(name)) for cell in flat}) > 1
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _hparams(trial: Trial, axes: Sequence[str]) -> tuple[Any, Any, Any]:
    """tensorboardX's experiment, session start and session end summaries."""
    config = _flatten(trial.config["trial"])
    columns = {
        _COLUMN_NAMES.get(name, name): value
        if isinstance(value := config.get(name), (bool, int, float, str))
        else str(value)
        for name in axes
    }
    return hparams(hparam_dict=columns, metric_dict=dict.fromkeys(METRICS, 0))
