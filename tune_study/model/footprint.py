"""The bytes of a model: as it is built, and as it will be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from tune_study.config import QuantizationConfig, TrialConfig
from tune_study.model.layers import COMPUTE_DTYPES, held_in_compute_dtype, plan_layers
from tune_study.model.quantize import (
    BLOCKSIZE,
    state_tensors,
    tensor_bytes,
)

NESTED_BLOCKSIZE = 256
CODEBOOK_BYTES = 16 * 4
NESTED_STATE_BYTES = 256 * 4 + 4
"""The codebook of the second quantization, and its offset."""


def bytes_at(tensors: Iterable[Tensor], width: int) -> int:
    """Bytes of ``tensors`` with ``width`` bytes a number; integers (indices) keep their own."""
    return sum(
        tensor.numel() * (width if tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors
    )


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of ``model``, and the quantization state."""
    tensors = [parameter.data for parameter in model.parameters()] + list(model.buffers())
    for module in model.modules():
        tensors += state_tensors(module)
    return tensors


def base_bytes(model: nn.Module) -> int:
    """Bytes of ``model_tensors``, each once."""
    return tensor_bytes(model_tensors(model))


def expected_weights_bytes(skeleton: nn.Module, config: TrialConfig) -> int:
    """Bytes of the base model as it will be built: quantized layers, plain ones in the compute
    dtype, and the residue at fp32."""
    total = bytes_at([*skeleton.parameters(), *skeleton.buffers()], 4)
    for name, mode in plan_layers(skeleton, config.quantization).items():
        layer = cast(nn.Linear, skeleton.get_submodule(name))
        full = 4 * layer.weight.numel()
        total += linear_bytes(layer.out_features, layer.in_features, mode) - full
    narrower = 4 - COMPUTE_DTYPES[config.training.compute_dtype].itemsize
    held = held_in_compute_dtype(skeleton, config)
    return total - narrower * sum(parameter.numel() for parameter in held)


def expected_state_bytes(skeleton: nn.Module, quantization: QuantizationConfig) -> int:
    """The part of ``expected_weights_bytes`` that is scales, codebooks and offsets."""
    total = 0
    for name, mode in plan_layers(skeleton, quantization).items():
        layer = cast(nn.Linear, skeleton.get_submodule(name))
        codes = math.ceil(layer.weight.numel() * (8 if mode == "int8" else 4) / 8)
        total += linear_bytes(layer.out_features, layer.in_features, mode) - codes
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
