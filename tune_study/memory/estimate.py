"""What a trial will take before it starts, and whether it fits into the device."""

from __future__ import annotations

import math
import platform
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from tune_study.config import QuantizationConfig, TrialConfig, UserError
from tune_study.data import Dataset
from tune_study.predict import of_a_step, predict
from tune_study.targets import skeleton_of

BACKWARD_SHARE = 1.0
"""Backward work over forward work: the frozen weights need no gradient of their own."""
EFFICIENCY = 0.4
"""Model work over the machine's matrix product rate, on two CPU cores; GPUs vary more."""
TOO_SLOW = 4.0
"""A device that multiplies bf16 this many times slower than fp32 has no kernel for it."""
X86 = ("x86_64", "AMD64")
ROOMY = 8
"""No mode's step takes as much as this many full-precision ones, whatever the depth: int8 keeps the
inputs of a block's layers, 7 times its width, where gradient checkpointing keeps the width."""


class Estimate(NamedTuple):
    """``weights_bytes`` is exact, the peak within 2 % on the CPU, the seconds within 2x."""

    weights_bytes: int
    peak_train_bytes: float
    """NaN for a model whose step cannot be predicted."""
    train_time_s: float


def estimate(config: TrialConfig, data: Dataset, device: torch.device) -> Estimate:
    """Expected bytes and seconds of one trial with all its epochs."""
    expected = predict(config, len(data.class_names), device)
    skeleton = skeleton_of(config.model, len(data.class_names), config.data.image_size)
    linears = [m for m in skeleton.modules() if isinstance(m, nn.Linear)]
    tokens = _tokens(skeleton)
    depth, width = len(getattr(skeleton, "blocks", ())), getattr(skeleton, "num_features", 0)
    forward = 2.0 * tokens * sum(m.in_features * m.out_features for m in linears)
    forward += 4.0 * tokens**2 * width * depth
    passes = 1 + BACKWARD_SHARE + config.training.gradient_checkpointing
    images = len(data.train.labels) * passes + len(data.val.labels)
    work = forward * images * config.training.num_train_epochs
    rate = matmul_rate(config.training.compute_dtype, str(device)) * EFFICIENCY
    peak = math.nan if expected.peak_train_bytes is None else expected.peak_train_bytes
    return Estimate(expected.weights_bytes, peak, work / rate)


def refuse_what_cannot_fit(config: TrialConfig, num_classes: int, device: torch.device) -> None:
    """Raises ``UserError`` when the predicted peak of a step is more than the memory now free."""
    if excess := _excess(config, num_classes, device):
        peak, free = excess
        settings = config.training
        smaller = (
            "lower training.per_device_train_batch_size "
            f"({settings.per_device_train_batch_size}; training.gradient_accumulation_steps keeps "
            "the batch of a step)"
        )
        if not settings.gradient_checkpointing:
            smaller += " or set training.gradient_checkpointing=true"
        raise UserError(
            f"{config.trial_id}: a training step needs {peak / 1e6:,.0f} MB, and {device.type} has "
            f"{free / 1e6:,.0f} MB free; {smaller}"
        )


def refuse_any_that_cannot_fit(
    planned: Iterable[tuple[TrialConfig, int]], device: torch.device
) -> None:
    """``refuse_what_cannot_fit`` for all (trial, classes) of a plan, with few predictions.

    A higher rank or more classes never make a step smaller: where the most of both fits, so do
    the other trials that differ in nothing else. Where ``ROOMY`` times that fits in full precision,
    no mode is looked at.
    """
    groups = defaultdict(list)
    for trial, classes in planned:
        groups[_of_rank(trial, 1).model_dump_json()].append((trial, classes))
    for group in groups.values():
        largest = _of_rank(group[0][0], max(trial.lora.r for trial, _ in group))
        most_classes = max(classes for _, classes in group)
        full = largest.model_copy(update={"quantization": QuantizationConfig()})
        if _excess(full, most_classes, device, ROOMY) and _excess(largest, most_classes, device):
            for trial, classes in group:
                refuse_what_cannot_fit(trial, classes, device)


def _excess(
    config: TrialConfig, num_classes: int, device: torch.device, times: int = 1
) -> tuple[float, int] | None:
    """(predicted peak of a step, memory now free) where ``times`` the first is more, in bytes."""
    peak, free = predict(config, num_classes, device).peak_train_bytes, free_bytes(device)
    return (peak, free) if peak is not None and free is not None and times * peak > free else None


def _of_rank(trial: TrialConfig, r: int) -> TrialConfig:
    lora = trial.lora.model_copy(update={"r": r})
    return of_a_step(trial.model_copy(update={"lora": lora}))


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new process can allocate on ``device``; ``None`` where none can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        ours = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(ours, psutil.virtual_memory().available)  # all processes share the memory
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    try:  # a container may have less than the machine
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return free


def _tokens(skeleton: nn.Module) -> int:
    position = getattr(skeleton, "pos_embed", None)
    return position.shape[1] if isinstance(position, torch.Tensor) and position.ndim == 3 else 197


def settle_compute_dtype(
    trials: Sequence[TrialConfig],
    device: str,
    planned: Collection[str] = (),
    compute_dtype: str | None = None,
) -> tuple[list[TrialConfig], str | None]:
    """(trials, ``without_bf16`` of ``device``, where that mattered).

    A trial that does not name its ``compute_dtype`` computes in bf16, but on a device without fast
    bf16 in fp32. In a study that is continued or extended, a trial whose id is among ``planned``
    keeps what it was planned with, and a new one takes ``compute_dtype``, that of all planned
    trials, whatever the device is.
    """
    settled, asked = [], False
    for trial in trials:
        if "compute_dtype" not in trial.training.model_fields_set and (
            trial.trial_id not in planned
        ):
            asked = True
            fp32 = _with_compute_dtype(trial, "fp32")
            wanted = compute_dtype or (
                "fp32" if without_bf16(device) else trial.training.compute_dtype
            )
            if fp32.trial_id in planned or wanted == "fp32":
                trial = fp32
        settled.append(trial)
    return settled, without_bf16(device) if asked else None


def _with_compute_dtype(trial: TrialConfig, compute_dtype: str) -> TrialConfig:
    training = trial.training.model_copy(update={"compute_dtype": compute_dtype})
    return trial.model_copy(update={"training": training})


def without_bf16(device: str) -> str | None:
    """Why bf16 is slower than fp32 on ``device``, as a clause; ``None`` where it is not.

    An x86 CPU without AVX512-BF16 multiplies bf16 matrices about as fast as fp32 ones with AVX512,
    and a hundred times slower with AVX2; a training step takes 1.4 to 2.3 times as long with the
    former (benchmarks/README.md). Other devices are measured.
    """
    if device == "cpu" and platform.machine() in X86:
        if torch.cpu._is_avx512_bf16_supported():
            return None
        return "this CPU has no bf16 instructions (AVX512-BF16)"
    slowness = bf16_slowness(device)
    if slowness <= TOO_SLOW:
        return None
    return f"{device} multiplies bf16 matrices {slowness:.0f} times slower than fp32 ones"


@cache
def bf16_slowness(device: str) -> float:
    """Time of a bf16 matrix product over that of an fp32 one, measured.

    With one thread: on a busy machine several wait for each other, and both kinds look slow.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _matmul_rate(256, "fp32", device) / _matmul_rate(256, "bf16", device)
    finally:
        torch.set_num_threads(threads)


@cache
def matmul_rate(compute_dtype: str, device: str) -> float:
    """Floating-point operations per second of a matrix product, measured now.

    1024 x 1024 matrices; 256 x 256 where that is slow.
    """
    return _matmul_rate(
        1024 if _matmul_rate(256, compute_dtype, device) > 1e10 else 256, compute_dtype, device
    )


def _matmul_rate(size: int, compute_dtype: str, device: str) -> float:
    """Of the fastest product in 0.2 s: what else the machine does meanwhile shall not count."""
    dtype = torch.bfloat16 if compute_dtype == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    fastest, elapsed = math.inf, 0.0
    float((matrix @ matrix)[0, 0])
    while elapsed < 0.2:
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading it waits for the device
        took = time.perf_counter() - started
        fastest, elapsed = min(fastest, took), elapsed + took
    return 2 * size**3 / fastest
