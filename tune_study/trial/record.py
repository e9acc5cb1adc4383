"""What a trial leaves: ``results.json`` and the files beside it, as far as they are known."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line
from tune_study.folder.files import now, write_json
from tune_study.folder.results import read_results
from tune_study.machine.energy import EnergyMeter
from tune_study.machine.provenance import commit, hardware, versions
from tune_study.machine.resources import rss_peak_bytes
from tune_study.model.build import BuiltModel
from tune_study.model.lora import why_pefts_own
from tune_study.model.quantize import LayerReport
from tune_study.trial.graph import why_eager
from tune_study.trial.micro_batch import out_of_memory_events
from tune_study.trial.training import Row, Training

FIDELITY_AT_START = ("gradient_cosine_start", "feature_cosine")
LOG_FILE = "trial.log"
LOG_TAIL_LINES = 50


def fidelity_columns(fidelity: dict[str, Any]) -> dict[str, float]:
    """The columns of ``schema.TRIALS``, as far as they are known."""
    columns = dict(fidelity.get("outputs", {}))
    for moment, suffix in (("start", "_start"), ("end", "")):
        found = fidelity.get(moment, {})
        columns[f"gradient_cosine{suffix}"] = found.get("cosine", math.nan)
        columns[f"gradient_norm_ratio{suffix}"] = found.get("norm_ratio", math.nan)
    return columns


class Record:
    """``results.json`` of one trial, as far as it is known, and its log."""

    def __init__(self, config: TrialConfig, folder: Path, device: str, num_threads: int) -> None:
        self.config, self.folder = config, folder
        self._device, self._num_threads = device, num_threads
        said = read_results(folder.parent, folder.name).get("warnings")
        self.warnings: list[str] = said if isinstance(said, list) else []
        """Sentences for the user: what went wrong and was mended."""
        self.notes: list[str] = []
        """Sentences about how the trial computes, which are no fault."""
        self.effective = config
        """``config`` with the micro-batch that memory allowed."""
        self.model_metrics: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self.fidelity: dict[str, Any] = {}
        self._analysis: dict[str, Any] = {}
        self.test_metrics: dict[str, float] = {}
        self.test_time_s = self._measuring_time_s = 0.0
        self.settings: dict[str, Any] = {}
        """What ``device.settle`` set."""
        self.trials_on_device: int | None = None
        """At a time, at most, in all runs of the trial; ``None`` where one of them did not say."""
        self.training: Training | None = None
        self.meter: EnergyMeter | None = None
        self.content: dict[str, Any] = {}
        self._started_at = now()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Counts the time of what belongs to the study and not to training: memory, fidelity."""
        started = time.perf_counter()
        yield
        self._measuring_time_s += time.perf_counter() - started

    def log(self, line: str) -> None:
        """A line of ``trial.log``, with the time."""
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(f"{now()} {line}\n")

    def warn(self, sentence: str) -> None:
        """For the log, and for the user."""
        self.warnings.append(sentence)
        self.log(f"warning: {sentence}")

    def warn_of_graph(self, training: Training) -> None:
        """Once each, where the step or the evaluation could not be captured."""
        for graph, what, then in (
            (training.graph, "the step", "steps are eager, with the same micro-batch"),
            (training.evaluation, "the evaluation", "it is eager"),
        ):
            if graph is None or graph.failure is None:
                continue
            why = f"{what} could not be captured as a CUDA graph ({graph.failure})"
            if f"{why}: {then}" not in self.warnings:
                self.warn(f"{why}: {then}")

    def note(self, sentence: str) -> None:
        """For ``results.json``, and once for the log."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            self.log(f"note: {sentence}")

    def built(self, built: BuiltModel, training: Training) -> None:
        self.training = training
        if why := why_pefts_own(self.config.lora):
            self.note(why)
        if why := why_eager(self.config, self._device):
            self.note(why)
        parameters = sum(p.numel() for p in training.parameters.values())
        self.model_metrics = {
            "total_parameters": built.base_parameters + parameters - built.learning_of_base,
            "trainable_parameters": parameters,
            "quantized_layers": len(built.layers),
            "quantized_blocks": built.quantized_blocks,
            "weights_bytes": built.weights_bytes,
            "weights_bytes_fp32": built.bytes_fp32,
            "weights_bytes_16bit": built.bytes_16bit,
            "weights_saving_fp32": 1 - built.weights_bytes / built.bytes_fp32,
            "weights_saving_16bit": 1 - built.weights_bytes / built.bytes_16bit,
            "quantization_error": built.quantization_error,
            "initial_error": built.initial_error,
            "num_classes": len(training.data.class_names),
            "train_images": len(training.data.train.labels),
            "val_images": len(training.data.val.labels),
            "test_images": len(training.data.test.labels),
            "data_sha256": training.data.sha256,
        }
        layers = [_layer(built, layer) for layer in built.layers]
        self._analysis = {
            "trial_id": self.config.trial_id,
            "mode": self.config.quantization.mode,
            "quantization_error": built.quantization_error,
            "initial_error": built.initial_error,
            "layers": layers,
        }

    def report_row(self, row: Row) -> dict[str, Any]:
        """What Tune gets: the epoch's columns, and the trial's bytes beside them."""
        constants = ("weights_bytes", "quantized_layers", "quantization_error")
        memory = ("peak_train_bytes", "activation_bytes")
        fidelity = fidelity_columns(self.fidelity)
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
        self.content = {
            "trial_id": self.config.trial_id,
            "status": status,
            "simulated": False,
            "error": self._sentence(status, error),
            "warnings": self.warnings,
            "run": {
                "config": self.config.model_dump(mode="json"),
                "device": self._device,
                "device_settings": self.settings,
                "num_threads": self._num_threads,
                "notes": self.notes,
                "started_at": self._started_at,
                "written_at": now(),
            },
            "train": {
                "training_results": self._training_results(history),
                "test_metrics": self.test_metrics,
                "model_metrics": {**self.model_metrics, **fidelity_columns(self.fidelity)},
                "resource_metrics": self._resources(),
                # Of this run of the trial; an earlier one's are not added.
                "measuring_time_s": self._measuring_time_s,
                "epochs": history,
            },
            "meta": {"versions": versions(), "commit": commit(), "hardware": hardware()},
        }
        if self.training is not None:
            self._write_layers(self.training)
        if error is not None:
            self.log(f"{status}: {type(error).__name__}: {error}")
            what = type(error).__name__, str(error)
            trace = "".join(traceback.format_exception(error))
            write_failure(self.folder, self.config, *what, len(history), trace)
        write_json(self.folder / "results.json", self.content)

    def _sentence(self, status: str, error: Exception | None) -> str | None:
        """What went wrong, in one line."""
        if status == "diverged":
            return f"the loss was not finite in epoch {len(self._history())}"
        return None if error is None else _sentence(error)

    def _energy(self, history: list[Row]) -> tuple[float, str | None]:
        """Joules of the epochs that count, and what counted them, or why they are not known."""
        if self.meter is None:
            return math.nan, None
        joules = [row.get("train_energy_j", math.nan) for row in history]
        total, unknown = math.fsum(joules), sum(map(math.isnan, joules))
        if unknown or not history:
            without = f"{unknown} of {len(joules)} epochs were trained without a reading"
            return math.nan, self.meter.why_not or (without if unknown else self.meter.source)
        if total == 0:
            return math.nan, f"the counter did not move ({self.meter.source})"
        return total, self.meter.source or "a counter that an earlier run of the trial had"

    def _resources(self) -> dict[str, Any]:
        settings = self.effective.training
        return {
            **self.memory,
            "rss_peak_bytes": rss_peak_bytes(),
            "energy_source": self._energy(self._history())[1],
            "batch_halvings": len(out_of_memory_events(self.folder)),
            "batch_size": settings.per_device_train_batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "device": self._device,
            "trials_on_device": self.trials_on_device,
            "step": self.training.step if self.training else None,
        }

    def _write_layers(self, training: Training) -> None:
        """``gradients.json`` and ``quantization_analysis.json``, layer by layer."""
        gradients = {"layers": list(training.parameters), "epochs": training.layer_gradients}
        write_json(self.folder / "gradients.json", gradients)
        analysis = {**self._analysis, "fidelity": self.fidelity}
        write_json(self.folder / "quantization_analysis.json", analysis)

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
            "train_energy_j": self._energy(history)[0],
            "eval_time_s": epoch_time - train_time + self.test_time_s,
            "images_per_s": statistics.median(row["images_per_s"] for row in history),
            **_over_epochs(history),
        }


def _layer(built: BuiltModel, layer: LayerReport) -> dict[str, Any]:
    """A layer of ``quantization_analysis.json``; errors are relative, of Frobenius norms.

    ``initial_error`` is that of the layer at the start, adapter included, and
    ``error_without_adapter`` what quantization alone leaves of the full-precision weights.
    """
    error, norm = built.initial_norms(layer)
    found = built.initial.get(layer.name)
    return {
        **layer._asdict(),
        "relative_error": layer.relative_error,
        "sqnr_db": layer.sqnr_db,
        "initial_error": error / norm if norm else math.nan,
        "error_without_adapter": found.alone_norm / norm if found else layer.relative_error,
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


def write_failure(
    folder: Path,
    config: TrialConfig,
    kind: str,
    message: str,
    last_epoch: int,
    trace: str | None = None,
) -> None:
    """``error.json``; ``trace`` is the traceback, which a worker that was killed has not."""
    content = {
        "trial_id": config.trial_id,
        "type": kind,
        "message": message,
        "traceback": trace,
        "config": config.model_dump(mode="json"),
        "last_epoch": last_epoch,
        "log_tail": log_tail(folder),
    }
    write_json(folder / "error.json", content)


def _sentence(error: Exception) -> str:
    name, said = type(error).__name__, first_line(error)[:500]
    return said if said == name or isinstance(error, UserError) else f"{name}: {said}"


def log_tail(folder: Path) -> list[str]:
    """The last lines of a trial's log."""
    try:
        text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-LOG_TAIL_LINES:]
