"""The one function that Ray calls: a configuration in, an epoch's row out, our files beside it."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from ray import tune

from tune_study import checkpoint, simulate, train
from tune_study.config import TrialConfig, UserError
from tune_study.data import load
from tune_study.fidelity import gradient_fidelity, output_fidelity, twin
from tune_study.files import write_json
from tune_study.memory import reset_rss_peak, rss_peak_bytes
from tune_study.model import BuiltModel, build_model
from tune_study.predict import predict
from tune_study.provenance import commit, hardware, now, versions
from tune_study.resources import ResourceMonitor
from tune_study.simulate import Simulation
from tune_study.train import Row, Training

FIDELITY_AT_START = ("gradient_cosine_start", "feature_cosine")
Report = Callable[[dict[str, Any], Path | None], None]
"""Takes a row and, for a new epoch, the folder of its checkpoint."""


class RunContext(BaseModel):
    """Where a trial runs: all that a worker needs and that does not decide the result."""

    model_config = ConfigDict(frozen=True)

    study_dir: Path
    data_dir: Path | None = None
    weights: Path | None = None
    device: str = "cpu"
    num_threads: int = 1
    simulation: Simulation | None = None
    """Draws the trials instead of training them."""


def run_trial(config: dict[str, Any], context: dict[str, Any]) -> None:
    """Tune's function trainable. ``config["trial"]`` is a ``TrialConfig`` as a dictionary.

    An exception is written to ``error.json`` and raised again, so that Tune knows of it too.
    """
    trial, where = TrialConfig.model_validate(config["trial"]), RunContext.model_validate(context)
    if where.simulation is not None:
        simulate.execute(trial, where.simulation, where.study_dir, _tune_report)
    else:
        execute(trial, where, _tune_report)


def _tune_report(row: dict[str, Any], folder: Path | None) -> None:
    tune.report(row, checkpoint=tune.Checkpoint.from_directory(folder) if folder else None)


def execute(config: TrialConfig, context: RunContext, report: Report) -> dict[str, Any]:
    """Runs or continues one trial and returns its ``results.json``.

    The trial continues from its newest whole checkpoint under ``context.study_dir``, wherever that
    folder has been moved to; the rows before it are reported again first, so that the logs of
    every run are complete.
    """
    torch.set_num_threads(context.num_threads)
    reset_rss_peak()
    folder = context.study_dir / config.trial_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.json").unlink(missing_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    record = _Record(config, context, folder)
    try:
        _train(config, context, report, record)
    except Exception as error:
        record.write("oom" if isinstance(error, torch.OutOfMemoryError) else "error", error)
        raise
    finally:
        gc.collect()  # the next trial of this worker starts without the tensors of this one
    return record.content


def _train(config: TrialConfig, context: RunContext, report: Report, record: _Record) -> None:
    device = torch.device(context.device)
    data = load(config.dataset, context.data_dir, config.data)
    built = build_model(config, len(data.class_names), weights=context.weights, device=device)
    training = train.start(config, built, data, device)
    record.built(built, training)
    found, broken = checkpoint.newest(context.study_dir, config.trial_id)
    for path in broken:
        print(f"{config.trial_id}: {path.name} is not whole; using the one before", file=sys.stderr)
    if found is not None:
        state, extra = checkpoint.load(found)
        training.load_state_dict(state)
        record.memory, record.fidelity = extra["memory"], extra.get("fidelity", {})
        for row in training.history:
            report(record.report_row(row), None)
    else:
        record.memory = _memory(config, built, training)
        record.fidelity = _fidelity_at_start(training, context.weights)
    record.write("interrupted")
    with ResourceMonitor(device) as resources:
        for row in train.fit(training):
            row |= resources.read()  # the history holds the same row
            record.write("interrupted")
            with tempfile.TemporaryDirectory() as temporary:
                extra = {"memory": record.memory, "fidelity": record.fidelity}
                checkpoint.save(Path(temporary), config.trial_id, training.state_dict(), extra)
                report(record.report_row(row), Path(temporary))
    status = train.finished(training)
    assert status is not None
    with twin(training, context.weights) as other:
        record.fidelity["end"] = gradient_fidelity(training, other)._asdict()
    if training.best:
        started = time.perf_counter()
        record.test_metrics = train.test(training)
        record.test_time_s = time.perf_counter() - started
        built.model.save_pretrained(str(record.folder / "adapter"), save_embedding_layers=False)
    record.write(status)


def _memory(config: TrialConfig, built: BuiltModel, training: Training) -> dict[str, Any]:
    """The ledger, measured and predicted, and what follows from it (``schema.TRIALS`` columns)."""
    measured = train.measure_memory(training)
    expected = predict(config, len(training.data.class_names), training.device)
    peak = measured.peak_train_bytes or math.nan
    saved = built.base_parameters * 4 - built.weights_bytes
    return {
        **measured._asdict(),
        "predicted_activation_bytes": expected.ledger.activation_bytes,
        "predicted_peak_train_bytes": expected.peak_train_bytes,
        "quantizable_peak_fraction": built.quantizable_bytes / peak,
        "peak_saving_fp32": saved / (peak + saved),
    }


def _fidelity_at_start(training: Training, weights: Path | None) -> dict[str, Any]:
    with twin(training, weights) as other:
        return {
            "start": gradient_fidelity(training, other)._asdict(),
            "outputs": output_fidelity(training, other, weights)._asdict(),
        }


def _fidelity_columns(fidelity: dict[str, Any]) -> dict[str, float]:
    """The columns of ``schema.TRIALS``, as far as they are known."""
    columns = dict(fidelity.get("outputs", {}))
    for moment, suffix in (("start", "_start"), ("end", "")):
        found = fidelity.get(moment, {})
        columns[f"gradient_cosine{suffix}"] = found.get("cosine", math.nan)
        columns[f"gradient_norm_ratio{suffix}"] = found.get("norm_ratio", math.nan)
    return columns


class _Record:
    """``results.json`` of one trial, as far as it is known."""

    def __init__(self, config: TrialConfig, context: RunContext, folder: Path) -> None:
        self.config, self.context, self.folder = config, context, folder
        self.model_metrics: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self.fidelity: dict[str, Any] = {}
        self._analysis: dict[str, Any] = {}
        self.test_metrics: dict[str, float] = {}
        self.test_time_s = 0.0
        self.training: Training | None = None
        self.content: dict[str, Any] = {}
        self._started_at = now()

    def built(self, built: BuiltModel, training: Training) -> None:
        self.training = training
        parameters = sum(p.numel() for p in training.parameters.values())
        self.model_metrics = {
            "total_parameters": built.base_parameters + parameters,
            "trainable_parameters": parameters,
            "quantized_layers": len(built.layers),
            "quantized_blocks": built.quantized_blocks,
            "weights_bytes": built.weights_bytes,
            "weights_bytes_fp32": built.base_parameters * 4,
            "weights_bytes_16bit": built.base_parameters * 2,
            "weights_saving_fp32": 1 - built.weights_bytes / (built.base_parameters * 4),
            "weights_saving_16bit": 1 - built.weights_bytes / (built.base_parameters * 2),
            "quantization_error": built.quantization_error,
            "num_classes": len(training.data.class_names),
            "train_images": len(training.data.train.labels),
            "val_images": len(training.data.val.labels),
            "test_images": len(training.data.test.labels),
            "data_sha256": training.data.sha256,
        }
        layers = [
            {**layer._asdict(), "relative_error": layer.relative_error, "sqnr_db": layer.sqnr_db}
            for layer in built.layers
        ]
        self._analysis = {
            "trial_id": self.config.trial_id,
            "mode": self.config.quantization.mode,
            "quantization_error": built.quantization_error,
            "layers": layers,
        }

    def report_row(self, row: Row) -> dict[str, Any]:
        """What Tune gets: the epoch's columns, and the trial's bytes beside them."""
        constants = ("weights_bytes", "quantized_layers", "quantization_error")
        memory = ("peak_train_bytes", "activation_bytes")
        fidelity = _fidelity_columns(self.fidelity)
        return {
            **row,
            **{name: fidelity.get(name, math.nan) for name in FIDELITY_AT_START},
            **{name: self.model_metrics[name] for name in constants},
            **{name: _nan_if_none(self.memory.get(name)) for name in memory},
            "best_val_accuracy": max(
                (r["val_accuracy"] for r in self._history()[: int(row["epoch"])]), default=math.nan
            ),
        }

    def _history(self) -> list[Row]:
        return self.training.history if self.training else []

    def write(self, status: str, error: Exception | None = None) -> None:
        """Writes ``results.json`` whole, and ``gradients.json``, and ``error.json`` if need be."""
        history = self._history()
        settings = self.config.training
        sentence = None if error is None else f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, UserError):
            sentence = _first_line(error)
        if status == "diverged":
            sentence = f"the loss was not finite in epoch {len(history)}"
        self.content = {
            "trial_id": self.config.trial_id,
            "status": status,
            "simulated": False,
            "error": sentence,
            "run": {
                "config": self.config.model_dump(mode="json"),
                "device": self.context.device,
                "num_threads": self.context.num_threads,
                "started_at": self._started_at,
                "written_at": now(),
            },
            "train": {
                "training_results": self._training_results(history),
                "test_metrics": self.test_metrics,
                "model_metrics": {**self.model_metrics, **_fidelity_columns(self.fidelity)},
                "resource_metrics": {
                    **self.memory,
                    "rss_peak_bytes": rss_peak_bytes(),
                    "batch_size": settings.per_device_train_batch_size,
                    "gradient_accumulation_steps": settings.gradient_accumulation_steps,
                    "device": self.context.device,
                },
                "epochs": history,
            },
            "meta": {"versions": versions(), "commit": commit(), "hardware": hardware()},
        }
        if self.training is not None:
            gradients = {
                "layers": list(self.training.parameters),
                "epochs": self.training.layer_gradients,
            }
            write_json(self.folder / "gradients.json", gradients)
            analysis = {**self._analysis, "fidelity": self.fidelity}
            write_json(self.folder / "quantization_analysis.json", analysis)
        if error is not None:
            write_json(self.folder / "error.json", self._failure(error))
        write_json(self.folder / "results.json", self.content)

    def _failure(self, error: Exception) -> dict[str, Any]:
        return {
            "trial_id": self.config.trial_id,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "config": self.config.model_dump(mode="json"),
            "last_epoch": len(self._history()),
        }

    def _training_results(self, history: list[Row]) -> dict[str, Any]:
        if not history:
            return {"epochs_completed": 0}
        train_time = math.fsum(row["train_time_s"] for row in history)
        epoch_time = math.fsum(row["epoch_time_s"] for row in history)
        training = self.training
        assert training is not None
        return {
            "epochs_completed": len(history),
            "best_epoch": training.best_epoch or None,
            "val_accuracy": training.best_accuracy,
            "train_time_s": train_time,
            "eval_time_s": epoch_time - train_time + self.test_time_s,
            "images_per_s": statistics.median(row["images_per_s"] for row in history),
            **_over_epochs(history),
        }


def _over_epochs(history: list[Row]) -> dict[str, float]:
    """The gradient columns of the whole trial: counts add up, the rest is the mean of epochs."""
    counts = ("grad_explosions", "loss_spikes")
    means = (
        "grad_norm_mean",
        "grad_norm_std",
        "grad_norm_cv",
        "stability_score",
        "gradient_cosine_successive",
    )
    result: dict[str, float] = {name: sum(int(row[name]) for row in history) for name in counts}
    result["grad_vanishing_layers"] = max(int(row["grad_vanishing_layers"]) for row in history)
    for name in means:
        finite = [row[name] for row in history if math.isfinite(row[name])]
        result[name] = statistics.fmean(finite) if finite else math.nan
    noise, square = (
        statistics.fmean(row.get(name, math.nan) for row in history)
        for name in ("gradient_noise_trace", "gradient_square")
    )
    result["gradient_noise_scale"] = noise / square if square > 0 else math.nan
    return result


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value


def _first_line(error: Exception) -> str:
    with contextlib.suppress(IndexError):
        return str(error).splitlines()[0][:500]
    return ""
