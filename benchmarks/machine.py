"""The machine's own limit: its measured matrix-product peak, and a step's share of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.steps import bare_step, synchronised
from tune_study.trial.training import Training

SIDE = 2048


def _seconds(work: Callable[[], None], rounds: int) -> list[float]:
    """Of each round, after one that is not measured."""
    work()
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return found


def product_peak(dtype: torch.dtype, device: str, rounds: int = 7) -> float:
    """FLOP/s of a square matrix product of side 2,048 (8,192 on a GPU): the best of ``rounds``."""
    side = SIDE if device == "cpu" else 4 * SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    work = synchronised(lambda: left @ right, device)
    seconds = _seconds(work, rounds)
    return 2 * side**3 / min(seconds)


def step_flops(training: Training) -> int:
    """Of one bare step, counted by torch's ``FlopCounterMode`` (products and attention).

    bitsandbytes' layers hide their products, so it is counted on ``none``.
    """
    with FlopCounterMode(display=False) as counter:
        bare_step(training)()
    return counter.get_total_flops()


def utilisation(training: Training, device: str, rounds: int = 7) -> dict[str, Any]:
    """Model FLOP utilisation of the bare step: its FLOP/s over the machine's peak."""
    dtype = torch.bfloat16 if training.config.training.compute_dtype == "bf16" else torch.float32
    flops, step = step_flops(training), synchronised(bare_step(training), device)
    seconds = _seconds(step, rounds)
    peak = product_peak(dtype, device)
    return {
        "compute_dtype": training.config.training.compute_dtype,
        "peak_flop_per_s": peak,
        "step_flop": flops,
        "step_flop_per_s": flops / statistics.median(seconds),
        "share_of_peak": flops / statistics.median(seconds) / peak,
    }


def operators(training: Training, device: str, most: int = 10) -> list[dict[str, Any]]:
    """Where a bare step's time goes: torch's profiler, by operator, share of its own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step = synchronised(bare_step(training), device)
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    return [
        {"operator": row.key, "calls": row.count, "share": getattr(row, key) / total}
        for row in rows[:most]
    ]
