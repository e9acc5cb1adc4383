"""Parts of the check of an accelerator (``benchmarks/accelerator.py``).

Each function without an underscore is one: settings in, rows out, in a process of its own.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pandas as pd
import torch

from benchmarks.processes import Row, attempt
from benchmarks.steps import MODES, config_of, started
from tune_study import doctor
from tune_study.errors import UserError
from tune_study.folder.files import now
from tune_study.folder.schema import MODES as ALL_MODES
from tune_study.machine import provenance
from tune_study.machine.device import choose_device
from tune_study.machine.resources import release_memory
from tune_study.memory.predict import predict
from tune_study.memory.step import Ledger
from tune_study.model.build import build_model
from tune_study.model.footprint import expected_weights_bytes
from tune_study.model.layers import skeleton_of
from tune_study.trial import train

CLASSES = 10
EXACT = Ledger._fields[:5]
"""Categories of the ledger that are predicted to the byte; activations are not."""
PEAK_TOLERANCE = 0.05
"""The largest error of a predicted peak in docs/memory.md is 4.5 %."""


def this_machine(settings: dict[str, Any]) -> Iterator[Row]:
    """Where all figures come from, and the device behind ``auto``."""
    try:
        device = choose_device(settings["device"])
    except UserError as error:
        yield Row("device", False, str(error))
        return
    hardware = provenance.hardware()
    figures = {
        "device": device,
        "at": now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
    }
    found = f"{device}; {hardware['gpu'] or 'no GPU'}; {hardware['cores']} x {hardware['cpu']}"
    yield Row("machine", None, found, figures)


def doctors(settings: dict[str, Any]) -> Iterator[Row]:
    """The doctor's verdicts, one a row."""
    for verdict in doctor.examine(torch.device(settings["device"])):
        remedy = "" if verdict.ok else f"; remedy: {verdict.remedy}"
        yield Row(verdict.check, verdict.ok, verdict.found + remedy)


def models(settings: dict[str, Any]) -> Iterator[Row]:
    """Every mode, built and proven, against the bytes that its shapes alone tell."""
    for model in settings["models"]:
        for mode in ALL_MODES:
            name = f"{model}, {mode}"
            yield attempt(_model, name, model, mode, settings)
            release_memory()


def _model(name: str, model: str, mode: str, settings: dict[str, Any]) -> Row:
    config = config_of(model, mode, settings["batch"], settings["device"])
    expected = expected_weights_bytes(skeleton_of(model, CLASSES, None), config)
    built = build_model(config, CLASSES, device=settings["device"])
    figures = {
        "weights_bytes": built.weights_bytes,
        "expected_weights_bytes": expected,
        "weights_bytes_fp32": built.bytes_fp32,
        "quantized_layers": len(built.layers),
        "quantization_error": built.quantization_error,
    }
    found = f"{built.weights_bytes:,} bytes, expected {expected:,}"
    if built.layers:
        found += f"; {len(built.layers)} layers, weight error {built.quantization_error:.4f}"
    return Row(name, built.weights_bytes == expected, found, figures)


def ledgers(settings: dict[str, Any]) -> Iterator[Row]:
    """The ledger of a training step, predicted and measured: two rows a model and mode."""
    for model in settings["models"]:
        for mode in MODES:
            name = f"{model}, {mode}, batch {settings['batch']}"
            ledger = attempt(_ledger, name, model, mode, settings)
            yield ledger
            if ledger.figures:  # it was measured
                yield _peak(ledger)
            release_memory()


def _ledger(name: str, model: str, mode: str, settings: dict[str, Any]) -> Row:
    """The categories that must be equal to the byte."""
    config = config_of(model, mode, settings["batch"], settings["device"])
    expected = predict(config, CLASSES, torch.device(settings["device"]))
    measured = train.measure_memory(started(config, settings["device"], settings["batch"]))
    predicted = {**expected.ledger._asdict(), "peak_train_bytes": expected.peak_train_bytes}
    figures = {"measured": measured._asdict(), "predicted": predicted}
    differ = [
        f"{field} {getattr(measured, field):,}, predicted {predicted[field]:,}"
        for field in EXACT
        if getattr(measured, field) != predicted[field]
    ]
    equal = f"{len(EXACT)} categories equal to the byte: {measured.ledger.at_rest_bytes:,} at rest"
    return Row(name, not differ, "; ".join(differ) or equal, figures)


def _peak(ledger: Row) -> Row:
    """The two that are predicted nearly, from the figures of a ledger's row."""
    measured, predicted = ledger.figures["measured"], ledger.figures["predicted"]
    source = measured["peak_source"]
    errors = {}
    for field in ("activation_bytes", "peak_train_bytes"):
        known = measured[field] is not None and predicted[field] is not None
        errors[field] = measured[field] / predicted[field] - 1 if known else math.nan
    peak = errors["peak_train_bytes"]
    found = f"missing: {source}"
    if math.isfinite(peak):
        found = (
            f"{measured['peak_train_bytes'] / 1e6:.1f} MB, predicted "
            f"{predicted['peak_train_bytes'] / 1e6:.1f} ({peak:+.1%}); activations "
            f"{errors['activation_bytes']:+.1%}; by {source}"
        )
    ok = abs(peak) <= PEAK_TOLERANCE if math.isfinite(peak) else None
    if "lower bound" in source:
        ok = None  # it tells where the peak is not, which no prediction can miss
    return Row(f"peak of {ledger.name}", ok, found, {"relative_error": errors})


def demo(settings: dict[str, Any]) -> Iterator[Row]:
    """The demo as a user starts it, and what it found."""
    grid, folder = settings["grid"], Path(settings["folder"])
    command = [sys.executable, "-m", "tune_study.run", "--grid", grid]
    command += ["--device", settings["device"], "--output-dir", str(folder)]
    begun, last = time.monotonic(), ""
    with subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    code, wall = process.returncode, time.monotonic() - begun
    found = f"exit code {code} after {wall:.0f} s" + (f"; last line: {last}" if code else "")
    yield Row(f"study {grid}", code == 0, found, {"exit_code": code, "wall_s": wall})
    table = folder / grid / "trials.csv"
    if table.is_file():
        for mode, rows in pd.read_csv(table).groupby("quantization", sort=False):
            yield _accuracies(str(mode), rows)


def _accuracies(mode: str, trials: pd.DataFrame) -> Row:
    statuses = ", ".join(
        f"{count} {status}" for status, count in trials["status"].value_counts().items()
    )
    found = trials["test_accuracy"].tolist()
    known = [value for value in found if math.isfinite(value)]
    words = "no accuracy"
    if known:
        mean, least, most = statistics.fmean(known), min(known), max(known)
        words = f"test accuracy {mean:.3f} ({least:.3f} to {most:.3f})"
    figures = {"test_accuracy": found, "train_time_s": trials["train_time_s"].tolist()}
    return Row(mode, None, f"{words}; {statuses}", figures)
