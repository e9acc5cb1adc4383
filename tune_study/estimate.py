"""What a trial will take, before it starts: weight bytes exactly, peak and time roughly."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import nn

from tune_study.config import TrialConfig, UserError
from tune_study.data import Dataset
from tune_study.quantize import BLOCKSIZE, plan_layers

NESTED_BLOCKSIZE = 256
CODEBOOK_BYTES = 16 * 4
NESTED_STATE_BYTES = 256 * 4 + 4
"""The codebook of the second quantization, and its offset."""
SAVED_BYTES = {"none": 69, "int8": 82, "nf4": 74, "nf4-dq": 74, "fp4": 74, "fp4-dq": 74}
"""Saved for backward per token, channel and block in bf16: measured on DeiT-tiny at batch 8 and on
the demo's backbone at batch 32 (67 to 82), all block layers adapted, dropout 0.1."""
BACKWARD_SHARE = 1.0
"""Backward work over forward work: the frozen weights need no gradient of their own."""
EFFICIENCY = 0.4
"""Model work over the machine's matrix product rate, on two CPU cores; GPUs vary more."""


class Estimate(NamedTuple):
    """``weights_bytes`` is exact; peak (about 20 %) and seconds (a factor of 2) are rough."""

    weights_bytes: int
    peak_train_bytes: int
    train_time_s: float


def estimate(config: TrialConfig, data: Dataset, device: torch.device) -> Estimate:
    """Expected bytes and seconds of one trial with all its epochs."""
    skeleton = skeleton_of(config.model, len(data.class_names), config.data.image_size)
    weights = expected_weights_bytes(skeleton, config)
    linears = [m for m in skeleton.modules() if isinstance(m, nn.Linear)]
    tokens = _tokens(skeleton)
    depth, width = len(getattr(skeleton, "blocks", ())), getattr(skeleton, "num_features", 0)
    scale = 1 if config.training.compute_dtype == "bf16" else 1.6
    saved = SAVED_BYTES[config.quantization.mode] * tokens * width * depth * scale
    batch = config.training.per_device_train_batch_size
    adapter = config.lora.r * 4 * sum(m.in_features + m.out_features for m in linears)
    peak = weights + 4 * adapter + round(saved * batch * 1.06)
    forward = 2.0 * tokens * sum(m.in_features * m.out_features for m in linears)
    forward += 4.0 * tokens**2 * width * depth
    images = len(data.train.labels) * (1 + BACKWARD_SHARE) + len(data.val.labels)
    work = forward * images * config.training.num_train_epochs
    rate = matmul_rate(config.training.compute_dtype, str(device)) * EFFICIENCY
    return Estimate(weights, peak, work / rate)


@cache
def skeleton_of(model: str, num_classes: int, image_size: int | None) -> nn.Module:
    """The timm model without any numbers, on the ``meta`` device. Raises ``UserError``."""
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta"):
            return timm.create_model(model, num_classes=num_classes, **options)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"model = {model}: timm cannot build it so: {error}") from None


def expected_weights_bytes(skeleton: nn.Module, config: TrialConfig) -> int:
    """Bytes of the base model as it will be built: quantized layers, and the residue at fp32."""
    total = 4 * sum(t.numel() for t in [*skeleton.parameters(), *skeleton.buffers()])
    for name, mode in plan_layers(skeleton, config.quantization).items():
        linear = cast(nn.Linear, skeleton.get_submodule(name))
        full = 4 * linear.weight.numel()
        total += linear_bytes(linear.out_features, linear.in_features, mode) - full
    return total


def linear_bytes(out_features: int, in_features: int, mode: str) -> int:
    """Bytes of one bitsandbytes weight [out, in] with its quantization state, without bias.

    int8 keeps a float32 scale per row; 4 bit a float32 scale per block of 64 and the codebook;
    double quantization one byte per block, and a float32 scale per 256 blocks (QLoRA, section 3).
    """
    weights = out_features * in_features
    if mode == "int8":
        return weights + 4 * out_features
    blocks = math.ceil(weights / BLOCKSIZE)
    if not mode.endswith("-dq"):
        return math.ceil(weights / 2) + 4 * blocks + CODEBOOK_BYTES
    nested = 4 * math.ceil(blocks / NESTED_BLOCKSIZE)
    return math.ceil(weights / 2) + blocks + nested + CODEBOOK_BYTES + NESTED_STATE_BYTES


def _tokens(skeleton: nn.Module) -> int:
    position = getattr(skeleton, "pos_embed", None)
    return position.shape[1] if isinstance(position, torch.Tensor) and position.ndim == 3 else 197


@cache
def matmul_rate(compute_dtype: str, device: str) -> float:
    """Floating-point operations per second of a 1024 x 1024 matrix product, measured now."""
    dtype = torch.bfloat16 if compute_dtype == "bf16" else torch.float32
    matrix = torch.randn(1024, 1024, device=device, dtype=dtype)
    count, elapsed = 0, 0.0
    float((matrix @ matrix)[0, 0])
    while elapsed < 0.3:
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading it waits for the device
        elapsed += time.perf_counter() - started
        count += 1
    return 2 * 1024**3 * count / elapsed
