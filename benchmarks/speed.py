"""How long a training step takes on a device, and how long the device works for it.

The part ``speed`` of ``benchmarks/accelerator.py``: it tells, and judges nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.processes import Row, attempt
from benchmarks.steps import MODES, bare_step, config_of, started, synchronised
from tune_study.machine.resources import release_memory
from tune_study.trial import train

ROUNDS = 9
ROUNDS_ON_CPU = 5
WARM_UP = 2
LAUNCHES = ("LaunchKernel", "GraphLaunch")
"""In the names of CUDA's calls, whatever their version."""


def speeds(settings: dict[str, Any]) -> Iterator[Row]:
    """A row for each model, batch and mode."""
    cells = [(model, settings["batch"]) for model in settings["models"]]
    if settings["large_batch"] and settings["device"] != "cpu":
        cells.append((settings["models"][-1], settings["large_batch"]))
    for model, batch in cells:
        for mode in MODES:
            name = f"{model}, {mode}, batch {batch}"
            yield attempt(_speed, name, model, mode, batch, settings["device"])
            release_memory()


def _speed(name: str, model: str, mode: str, batch: int, device: str) -> Row:
    config = config_of(model, mode, batch, device)
    training = started(config, device, batch)
    images = training.data.train

    def whole() -> None:
        train.train_step(training, *images)

    times = {"whole_step_ms": _ms(whole, device), "bare_step_ms": _ms(bare_step(training), device)}
    work = device_work(whole, device)
    times["evaluation_ms"] = _ms(lambda: train.evaluate(training, images), device)
    medians = {key: statistics.median(values) for key, values in times.items()}
    images_per_s = 1e3 * batch / medians["whole_step_ms"]
    figures = {
        "compute_dtype": config.training.compute_dtype,
        **times,
        "medians": medians,
        "images_per_s": images_per_s,
        "device_work": work,
    }
    words = [
        f"{key.removesuffix('_ms').replace('_', ' ')} {medians[key]:.1f} ms "
        f"({min(values):.1f} to {max(values):.1f})"
        for key, values in times.items()
    ]
    found = f"{', '.join(words)}; {work['found']}; {images_per_s:.0f} images/s"
    return Row(name, None, f"{found} in {config.training.compute_dtype}", figures)


def _ms(work: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of each of several calls, after two that are not measured."""
    call = synchronised(work, device)
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(ROUNDS_ON_CPU if device == "cpu" else ROUNDS):
        begun = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begun))
    return found


def device_work(step: Callable[[], object], device: str) -> dict[str, Any]:
    """What torch's profiler saw of one step: ``found`` in words, the rest in figures."""
    if device == "mps":
        reason = "torch.profiler sees no kernels of MPS"
        return {"kernels_ms": math.nan, "found": f"kernels: missing, {reason}"}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call = synchronised(step, device)
    call()
    with torch.profiler.profile(activities=activities) as profile:
        call()
    rows = profile.key_averages()
    return of_kernels(rows) if device == "cuda" else of_operators(rows)


def of_operators(rows: Iterable[Any]) -> dict[str, Any]:
    """The CPU's operators: their own time, and how many there were."""
    listed = list(rows)
    own = sum(row.self_cpu_time_total for row in listed) / 1e3
    calls = sum(row.count for row in listed)
    found = f"operators' own time {own:.1f} ms in {calls} calls"
    return {"operators_ms": own, "operator_calls": calls, "found": found}


def of_kernels(rows: Iterable[Any]) -> dict[str, Any]:
    """CUDA's kernels: their time, their number, and the launches of a step.

    Copies and fills are counted apart. A range that a user has named is on the device's track too,
    and no work of its own. NaN where the profiler saw no kernel, which some machines forbid.
    """
    listed = list(rows)
    on_device = [r for r in listed if r.device_type == DeviceType.CUDA and not r.is_user_annotation]
    copies = [r for r in on_device if r.key.startswith(("Memcpy", "Memset"))]
    kernels = [r for r in on_device if r not in copies]
    launches = sum(
        r.count
        for r in listed
        if r.device_type == DeviceType.CPU and any(word in r.key for word in LAUNCHES)
    )
    if not kernels:
        reason = "torch.profiler saw none"
        return {"kernels_ms": math.nan, "found": f"kernels: missing, {reason}"}
    took, copied = (sum(r.self_device_time_total for r in some) / 1e3 for some in (kernels, copies))
    count = sum(r.count for r in kernels)
    return {
        "kernels_ms": took,
        "kernels": count,
        "launches": launches,
        "copies_ms": copied,
        "copies": sum(r.count for r in copies),
        "found": f"{count} kernels take {took:.1f} ms, in {launches} launches",
    }
