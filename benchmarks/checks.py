"""What the check of an accelerator looks at, times aside (``benchmarks/accelerator.py``).

Each function without an underscore is a part: settings in, rows out, in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file

from benchmarks.processes import Row, attempt
from benchmarks.steps import MODES, config_of, started
from tune_study import doctor, provenance, resources, train
from tune_study.config import TrialConfig, UserError, parse_trial
from tune_study.estimate import settle_compute_dtype
from tune_study.files import read_json
from tune_study.memory import Ledger, release_memory
from tune_study.model import build_model
from tune_study.predict import expected_weights_bytes, predict
from tune_study.preflight import choose_device
from tune_study.schema import MODES as ALL_MODES
from tune_study.targets import skeleton_of
from tune_study.trainable import RunContext, execute

CLASSES = 10
EXACT = Ledger._fields[:5]
"""Categories of the ledger that are predicted to the byte; activations are not."""
PEAK_TOLERANCE = 0.05
"""The largest error of a predicted peak in docs/memory.md is 4.5 %."""
TIMES = (
    "epoch_time_s",
    "train_time_s",
    "eval_time_s",
    "measuring_time_s",
    "images_per_s",
    "rss_peak_bytes",
    *resources.COLUMNS,
)
"""What no two runs have in common."""
NAMED = 3


def this_machine(settings: dict[str, Any]) -> Iterator[Row]:
    """Where all figures come from, and the device behind ``auto``."""
    try:
        device = choose_device(settings["device"])
    except UserError as error:
        yield Row("device", False, str(error))
        return
    figures = {
        "device": device,
        "at": provenance.now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "threads": torch.get_num_threads(),
    }
    hardware = figures["hardware"]
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
            yield attempt(name, lambda n=name, m=model, q=mode: _model(n, m, q, settings))
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
            try_ledger = attempt(name, lambda n=name, m=model, q=mode: _ledger(n, m, q, settings))
            yield try_ledger
            if try_ledger.figures:
                yield _peak(try_ledger)
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


def repeats(settings: dict[str, Any]) -> Iterator[Row]:
    """A trial twice, and killed after its first epoch and continued, in every mode."""
    for mode in ALL_MODES:
        config = _trial(mode, settings["device"])
        alone = Path(settings["folder"]) / mode / "alone"
        first = attempt(f"{mode}: a trial", lambda c=config, f=alone: _first(c, f, settings))
        yield first
        if not first.ok:
            continue
        for name, run in (("twice", _again), ("killed and continued", _killed_and_continued)):
            row = f"{mode}: {name}"
            yield attempt(row, lambda r=row, w=run, c=config, f=alone: w(r, c, f, settings))


def _trial(mode: str, device: str) -> TrialConfig:
    """Two epochs of three steps, the last of them smaller, with dropout."""
    trial = parse_trial(
        {
            "model": "vit_glyphs_patch4_32",
            "dataset": "digits",
            "lora": {"r": 4, "lora_alpha": 8},
            "quantization": mode,
            "data": {"train_size": 40, "val_size": 20, "test_size": 20},
            "training": {
                "num_train_epochs": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 1,
                "per_device_train_batch_size": 16,
            },
        }
    )
    return settle_compute_dtype([trial], device)[0][0]


def _run(config: TrialConfig, folder: Path, settings: dict[str, Any]) -> None:
    execute(config, RunContext(study_dir=folder, device=settings["device"]), lambda row: None)


def _first(config: TrialConfig, folder: Path, settings: dict[str, Any]) -> Row:
    _run(config, folder, settings)
    results = read_json(folder / config.trial_id / "results.json")["train"]
    epochs = [row["train_loss"] for row in results["epochs"]]
    losses = ", ".join(f"{loss:.4f}" for loss in epochs)
    name = f"{config.quantization.mode}: a trial"
    return Row(name, True, f"loss {losses} in {config.training.compute_dtype}", results)


def _again(name: str, config: TrialConfig, alone: Path, settings: dict[str, Any]) -> Row:
    folder = alone.with_name("again")
    _run(config, folder, settings)
    return compare(name, alone / config.trial_id, folder / config.trial_id)


def _killed_and_continued(
    name: str, config: TrialConfig, alone: Path, settings: dict[str, Any]
) -> Row:
    folder = alone.with_name("killed")
    # The server has imported all and touched no device: each child begins in no time, and clean.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["tune_study.trainable"])
    child = context.Process(target=_die, args=(config, folder, settings))
    child.start()
    child.join()
    left = read_json(folder / config.trial_id / "results.json") or {}
    if child.exitcode != -signal.SIGKILL:
        ended = f"exit code {child.exitcode}, {left.get('error')}"
        return Row(name, False, f"it ended by itself before the kill: {ended}")
    if left["status"] != "interrupted" or len(left["train"]["epochs"]) != 1:
        return Row(name, False, f"killed with status {left['status']}, not after one epoch")
    _run(config, folder, settings)
    return compare(name, alone / config.trial_id, folder / config.trial_id)


def _die(config: TrialConfig, folder: Path, settings: dict[str, Any]) -> None:
    """A trial whose process is killed when its first epoch is reported."""
    context = RunContext(study_dir=folder, device=settings["device"])
    execute(config, context, lambda row: os.kill(os.getpid(), signal.SIGKILL))


def compare(name: str, one: Path, other: Path) -> Row:
    """Two folders of one trial: the adapter's bytes, and every number that is no time."""
    adapters = [f / "adapter" / "adapter_model.safetensors" for f in (one, other)]
    numbers = [dict(_numbers(read_json(f / "results.json")["train"])) for f in (one, other)]
    keys = sorted(numbers[0].keys() | numbers[1].keys())
    differ = [key for key in keys if numbers[0].get(key) != numbers[1].get(key)]
    figures = {"differ": {key: [n.get(key) for n in numbers] for key in differ}}
    if adapters[0].read_bytes() == adapters[1].read_bytes() and not differ:
        size = adapters[0].stat().st_size
        return Row(name, True, f"equal to the last bit: {size:,} bytes, {len(keys)} numbers")
    tensors = [load_file(path) for path in adapters]
    by = {key: float((t - tensors[1][key]).abs().max()) for key, t in tensors[0].items()}
    figures["adapters_differ_by"] = by
    apart = sum(value != 0 for value in by.values())
    found = f"{apart} of {len(by)} tensors differ, by up to {max(by.values()):.1e}; "
    found += f"{len(differ)} of {len(keys)} numbers: {', '.join(differ[:NAMED]) or 'none'}"
    return Row(name, False, found, figures)


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, number as Python writes it) of all that is no time."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in TIMES:
                yield from _numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{path}.{index}")
    else:
        yield path, repr(value)


def demo(settings: dict[str, Any]) -> Iterator[Row]:
    """The demo as a user starts it, and what it found."""
    grid, folder = settings["grid"], Path(settings["folder"])
    command = [sys.executable, "-m", "tune_study.run", "--grid", grid]
    command += ["--device", settings["device"], "--output-dir", str(folder)]
    begun = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    wall = time.monotonic() - begun
    figures = {"exit_code": code, "wall_s": wall}
    yield Row(f"study {grid}", code == 0, f"exit code {code} after {wall:.0f} s", figures)
    trials = pd.read_csv(folder / grid / "trials.csv")
    for mode, rows in trials.groupby("quantization", sort=False):
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
