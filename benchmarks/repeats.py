"""Is a trial the same twice, and killed and continued? A part of ``benchmarks/accelerator.py``."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.processes import Row, attempt
from tune_study.checks.modes import small_trial
from tune_study.config import TrialConfig
from tune_study.folder.files import read_json
from tune_study.folder.schema import MODES
from tune_study.machine import provenance, resources
from tune_study.trial.context import RunContext
from tune_study.trial.execution import execute

TIMES = (
    "epoch_time_s",
    "train_time_s",
    "train_energy_j",
    "energy_source",
    "eval_time_s",
    "measuring_time_s",
    "images_per_s",
    "rss_peak_bytes",
    *resources.COLUMNS,
)
"""What no two runs have in common."""
NAMED = 3


def repeats(settings: dict[str, Any]) -> Iterator[Row]:
    """A trial twice, and killed after its first epoch and continued, in every mode."""
    device = settings["device"]
    trials = {mode: _trial(mode, device) for mode in MODES}
    return repeated(trials, Path(settings["folder"]), device)


def repeated(trials: Mapping[str, TrialConfig], folder: Path, device: str) -> Iterator[Row]:
    """The rows of ``repeats`` for ``trials``, by mode.

    The processes to be killed import everything for seconds: they begin first, beside each other.
    """
    with ThreadPoolExecutor(min(len(trials), provenance.cores())) as pool:
        ends = {
            mode: pool.submit(_killed, trial, folder / mode / "killed", device)
            for mode, trial in trials.items()
        }
        for mode, trial in trials.items():
            where = folder / mode
            first = attempt(_first, f"{mode}: a trial", trial, where, device)
            yield first
            if first.ok:
                yield attempt(_again, f"{mode}: twice", trial, where, device)
                name = f"{mode}: killed and continued"
                yield attempt(_continued, name, trial, where, device, ends[mode])


def _trial(mode: str, device: str) -> TrialConfig:
    """The doctor's trial for two epochs of three steps, the last of them smaller, with dropout."""
    trial = small_trial(mode, torch.device(device))
    training = trial.training.model_copy(update={"num_train_epochs": 2})
    return trial.model_copy(update={"training": training})


def _run(config: TrialConfig, folder: Path, device: str) -> Path:
    """The trial's own folder."""
    execute(config, RunContext(study_dir=folder, device=device), lambda row: None)
    return folder / config.trial_id


def _first(name: str, config: TrialConfig, where: Path, device: str) -> Row:
    results = json.loads((_run(config, where / "alone", device) / "results.json").read_text())
    losses = ", ".join(f"{row['train_loss']:.4f}" for row in results["train"]["epochs"])
    found = f"loss {losses} in {config.training.compute_dtype}"
    return Row(name, True, found, results["train"])


def _again(name: str, config: TrialConfig, where: Path, device: str) -> Row:
    return compare(name, where / "alone" / config.trial_id, _run(config, where / "again", device))


def _continued(
    name: str, config: TrialConfig, where: Path, device: str, killed: Future[int | None]
) -> Row:
    code = killed.result()
    left = read_json(where / "killed" / config.trial_id / "results.json")
    if code != -signal.SIGKILL:
        reason = left["error"] if left else "it left nothing"
        return Row(name, False, f"exit code {code} instead of the kill: {reason}")
    if left is None or len(left["train"]["epochs"]) != 1:
        return Row(name, False, "it was killed before its first epoch was reported")
    return compare(name, where / "alone" / config.trial_id, _run(config, where / "killed", device))


def _killed(config: TrialConfig, folder: Path, device: str) -> int | None:
    """The exit code of a process that kills itself after an epoch.

    Not a fork: bitsandbytes has begun with CUDA when it was imported, which no fork survives.
    """
    child = multiprocessing.get_context("spawn").Process(target=_die, args=(config, folder, device))
    child.start()
    child.join()
    return child.exitcode


def _die(config: TrialConfig, folder: Path, device: str) -> None:
    """A trial whose process is killed when its first epoch is reported."""
    context = RunContext(study_dir=folder, device=device)
    execute(config, context, lambda row: os.kill(os.getpid(), signal.SIGKILL))


def compare(name: str, one: Path, other: Path) -> Row:
    """Two folders of one trial: the adapter's bytes, and every number that is no time."""
    adapters = [f / "adapter" / "adapter_model.safetensors" for f in (one, other)]
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    numbers = [dict(_numbers(result["train"])) for result in results]
    keys = sorted(numbers[0].keys() | numbers[1].keys())
    differ = [key for key in keys if numbers[0].get(key) != numbers[1].get(key)]
    figures: dict[str, Any] = {"differ": {key: [n.get(key) for n in numbers] for key in differ}}
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
