"""What a trial will take before it starts, and whether it fits into the device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from tune_study.config import LoraSpec, TrialConfig
from tune_study.data.names import DECODED
from tune_study.data.splits import Outline
from tune_study.errors import UserError
from tune_study.machine.device import free_bytes, matmul_rate
from tune_study.machine.gpus import Need
from tune_study.memory.predict import of_a_step, predict
from tune_study.model.build import preprocessing
from tune_study.model.layers import skeleton_of

BACKWARD_SHARE = 1.0
"""Backward work over forward work: the frozen weights need no gradient of their own."""
EFFICIENCY = 0.4
"""Model work over the machine's matrix product rate, on two CPU cores; GPUs vary more."""
DORA, LORA_BIAS = 2.4, 1.5
"""Time of a step over that of plain LoRA, by PEFT's own pass: DeiT-tiny on a CPU, 2.3 to 2.5 and
1.45 to 1.54 in all modes."""
ROOMY = 8
"""No mode's step takes as much as this many full-precision ones, whatever the depth: int8 keeps the
inputs of a block's layers, 7 times its width, where gradient checkpointing keeps the width."""
ALLOCATED = 1.2
"""What torch's allocator takes of a GPU over what it gives out, and evaluation beside a step. Not
measured: a step's predicted peak alone is 0.2 to 1.8 % below the measured one (docs/memory.md)."""
PROCESS_BYTES = 2**30
"""Of a GPU, beside all tensors: CUDA's own, kernels, the workspaces of products. Not measured."""
BUILT_IN_SIDE = 32
"""Pixels of CIFAR's images; digits are smaller."""

Planned = tuple[TrialConfig, int]
"""A trial and how many classes it has."""


class Estimate(NamedTuple):
    """``weights_bytes`` is exact, the peak within 2 % on the CPU, the seconds within 2x."""

    weights_bytes: int
    peak_train_bytes: float
    """NaN for a model whose step cannot be predicted."""
    train_time_s: float
    """NaN for images that are not known."""


def estimate(config: TrialConfig, data: Outline, device: torch.device) -> Estimate:
    """Expected bytes and seconds of one trial with all its epochs."""
    expected = predict(config, data.classes, device)
    skeleton = skeleton_of(config.model, data.classes, config.data.image_size)
    linears = [m for m in skeleton.modules() if isinstance(m, nn.Linear)]
    tokens = _tokens(skeleton)
    depth, width = len(getattr(skeleton, "blocks", ())), getattr(skeleton, "num_features", 0)
    forward = 2.0 * tokens * sum(m.in_features * m.out_features for m in linears)
    forward += 4.0 * tokens**2 * width * depth
    passes = 1 + BACKWARD_SHARE + config.training.gradient_checkpointing
    images = data.train * passes + data.val
    work = forward * images * config.training.num_train_epochs * _times_plain(config.lora)
    rate = matmul_rate(config.training.compute_dtype, str(device)) * EFFICIENCY
    peak = math.nan if expected.peak_train_bytes is None else expected.peak_train_bytes
    time_s = work / rate if data.is_known else math.nan
    return Estimate(expected.weights_bytes, peak, time_s)


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


def refuse_any_that_cannot_fit(planned: Iterable[Planned], device: torch.device) -> None:
    """``refuse_what_cannot_fit`` for all (trial, classes) of a plan, with few predictions.

    Where the highest rank and the most classes fit, so do the other trials that differ in nothing
    else. Where ``ROOMY`` times that fits in full precision, no mode is looked at.
    """
    for group in _by_step(planned):
        largest, most_classes = _largest(group)
        full = largest.unquantized
        if _excess(full, most_classes, device, ROOMY) and _excess(largest, most_classes, device):
            for trial, classes in group:
                refuse_what_cannot_fit(trial, classes, device)


def need_of(
    planned: Sequence[tuple[TrialConfig, Outline]],
    device: torch.device,
    process_bytes: int = PROCESS_BYTES,
) -> Need:
    """The most that any trial of the plan takes, its comparison with full precision included.

    ``process_bytes`` are those beside all tensors.
    """
    most = max(_most_bytes(group, device) for group in _by_step(_classes(planned)))
    if math.isinf(most):
        return Need(None, 0)
    images = max(_image_bytes(trial, data) for trial, data in planned)
    return Need(int(most * ALLOCATED) + process_bytes, images)


def largest_of(planned: Sequence[tuple[TrialConfig, Outline]], device: torch.device) -> TrialConfig:
    """The trial that ``need_of`` is of; one whose step can't be predicted is the largest."""
    group = max(_by_step(_classes(planned)), key=lambda group: _most_bytes(group, device))
    return max(group, key=lambda trial: trial[0].lora.r)[0]


def _classes(planned: Iterable[tuple[TrialConfig, Outline]]) -> Iterable[Planned]:
    return ((trial, data.classes) for trial, data in planned)


def _most_bytes(group: Sequence[Planned], device: torch.device) -> float:
    """At once, of tensors but images; infinite where it can't be predicted."""
    config, classes = _largest(group)
    full = config.unquantized
    expected, twin = predict(config, classes, device), predict(full, classes, device)
    if expected.peak_train_bytes is None or twin.peak_train_bytes is None:
        return math.inf
    if full == config:
        return expected.peak_train_bytes
    return max(expected.peak_train_bytes, expected.ledger.at_rest_bytes + twin.peak_train_bytes)


def _image_bytes(trial: TrialConfig, data: Outline) -> int:
    own = trial.dataset.startswith(DECODED)
    side = preprocessing(trial).image_size if own else BUILT_IN_SIDE
    return (data.train + data.val + data.test) * 3 * side**2


def _by_step(planned: Iterable[Planned]) -> Iterable[Sequence[Planned]]:
    """Trials that differ in nothing that a step's bytes depend on, but in rank and classes."""
    groups = defaultdict(list)
    for trial, classes in planned:
        groups[_of_rank(trial, 1).model_dump_json()].append((trial, classes))
    return groups.values()


def _largest(group: Sequence[Planned]) -> Planned:
    """A higher rank or more classes never make a step smaller."""
    r = max(trial.lora.r for trial, _ in group)
    return _of_rank(group[0][0], r), max(classes for _, classes in group)


def _excess(
    config: TrialConfig, num_classes: int, device: torch.device, times: int = 1
) -> tuple[float, int] | None:
    """(predicted peak of a step, memory now free) where ``times`` the first is more, in bytes."""
    peak, free = predict(config, num_classes, device).peak_train_bytes, free_bytes(device)
    return (peak, free) if peak is not None and free is not None and times * peak > free else None


def _of_rank(trial: TrialConfig, r: int) -> TrialConfig:
    lora = trial.lora.model_copy(update={"r": r})
    return of_a_step(trial.model_copy(update={"lora": lora}))


def _times_plain(lora: LoraSpec) -> float:
    if lora.use_dora:
        return DORA
    return LORA_BIAS if lora.lora_bias else 1.0


def _tokens(skeleton: nn.Module) -> int:
    position = getattr(skeleton, "pos_embed", None)
    return position.shape[1] if isinstance(position, torch.Tensor) and position.ndim == 3 else 197
