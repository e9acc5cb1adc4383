"""``nn.Linear`` of the transformer blocks -> bitsandbytes, and the proof that it happened."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from tune_study.config import QuantizationConfig
from tune_study.errors import UserError
from tune_study.model.layers import block_linears, plan_layers

BLOCKSIZE = 64
INT8_THRESHOLD = 6.0
"""LLM.int8(): activation columns with a value beyond it are computed in 16 bit."""

GAUSSIAN_ERROR_BANDS = {
    "int8": (0.004, 0.015),
    "nf4": (0.08, 0.11),
    "nf4-dq": (0.08, 0.11),
    "fp4": (0.10, 0.14),
    "fp4-dq": (0.10, 0.14),
}
"""Relative Frobenius error of Gaussian weights; the measured centres are 0.007, 0.092, 0.122."""
WEIGHT_ERROR_LIMITS = {"int8": 0.1, "nf4": 0.25, "nf4-dq": 0.25, "fp4": 0.3, "fp4-dq": 0.3}
"""Real weights are not Gaussian: beyond these the layer is not what it is called."""


class QuantizationFailed(UserError):
    """Quantization did not, or cannot, happen as asked. Never trained around."""


class LayerReport(NamedTuple):
    """One quantized layer, measured. Bytes are of the weight and its quantization state."""

    name: str
    mode: str
    layer_class: str
    dtype: str
    shape: tuple[int, int]
    weight_bytes: int
    state_bytes: int
    error_norm: float
    weight_norm: float

    @property
    def relative_error(self) -> float:
        """||W - dequantized W|| / ||W||, Frobenius."""
        return self.error_norm / self.weight_norm if self.weight_norm else math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise: 20 log10 of the inverse relative error, in decibel."""
        return -20 * math.log10(self.relative_error) if self.error_norm else math.inf


def quantize_linear(
    linear: nn.Linear, mode: str, compute_dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """A frozen bitsandbytes layer made from the full-precision weights of ``linear``.

    bitsandbytes quantizes when the layer is moved to ``device``, the CPU included, and in int8 only
    what comes from the CPU.
    """
    quantized = _int8(linear) if mode == "int8" else _four_bit(linear, mode, compute_dtype)
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    quantized.forward = MethodType(outside_autocast, quantized)
    quantized.to(device)
    if mode != "int8":  # for backward, which would dequantize to float32 and cast
        cast(Any, quantized.weight).quant_state.dtype = compute_dtype
    return quantized


def _shape(linear: nn.Linear) -> dict[str, Any]:
    """On "meta" nothing is allocated or initialised: weight and bias are put in afterwards."""
    return {
        "input_features": linear.in_features,
        "output_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": "meta",
    }


def _int8(linear: nn.Linear) -> nn.Module:
    # The library's defaults keep 16-bit weights and no outlier threshold: set both.
    layer = bnb.nn.Linear8bitLt(**_shape(linear), has_fp16_weights=False, threshold=INT8_THRESHOLD)
    weight = linear.weight.detach().to("cpu", copy=True)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer


def _four_bit(linear: nn.Linear, mode: str, compute_dtype: torch.dtype) -> nn.Module:
    quant_type, _, double = mode.partition("-")
    # The library's defaults are fp4 with double quantization: set all.
    settings: dict[str, Any] = {
        "quant_type": quant_type,
        "compress_statistics": double == "dq",
        "quant_storage": torch.uint8,
    }
    layer = bnb.nn.Linear4bit(**_shape(linear), compute_dtype=compute_dtype, **settings)
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().to("cpu", copy=True),
        requires_grad=False,
        blocksize=BLOCKSIZE,
        module=layer,
        **settings,
    )
    # With it on, the first eval forward on an AVX512-BF16 CPU repacks the weights, and the next
    # training step raises or loses its gradient (seen with bitsandbytes 0.50.2).
    layer.support_avx512bf16_for_cpu = False
    return layer


def outside_autocast(
    layer: Any, x: Tensor, compute: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """Autocast casts the input, as that of a plain layer, and ends there. ``compute`` takes layer
    and input, in the place of bitsandbytes' own forward pass.

    Within, it would reach the products that bitsandbytes makes of torch's own: that of int8 codes,
    exact in fp32, was rounded to bf16 where no kernel multiplies integers (MPS, CPUs without
    AVX512).
    """
    x = autocasted(x)
    compute, bias = compute or type(layer).forward, layer.bias
    with torch.autocast(x.device.type, enabled=False):
        if bias is None or not bias.requires_grad:
            return compute(layer, x)
        # bitsandbytes would cast a bias that learns to the type of the input, for good.
        layer.bias = None
        try:
            out = compute(layer, x)
        finally:
            layer.bias = bias
        return out + bias.to(out.dtype)


def autocasted(x: Tensor) -> Tensor:
    """``x`` as autocast would hand it to a linear layer."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def dequantize(layer: nn.Module) -> Tensor:
    """The weights that ``layer`` stands for: [out, in] in float32 (float16 steps for int8)."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes, scales = int8_state(layer)
        return codes.float() * (scales.float() / 127).view(-1, 1)
    if not isinstance(layer, bnb.nn.Linear4bit):
        raise TypeError(f"{type(layer).__name__} is not a quantized layer")
    weight: Any = layer.weight
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # not that of backward
    return dequantize_4bit(weight.data, state)


def offer_dequantize(model: nn.Module) -> None:
    """Lets PEFT's DoRA, which reads the base weights in every pass, do so by ``dequantize``.

    By its own way an int8 layer on the CPU has lost its scales after the first pass, and the second
    raises (peft 0.21.2, bitsandbytes 0.50.2). It asks layers with a ``W_q``, such as HQQ's, for
    their ``dequantize``, and that for its device.
    """
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
            layer.__dict__["W_q"] = torch.empty(0, device=layer.weight.device)
            if not hasattr(layer, "dequantize"):
                layer.__dict__["dequantize"] = MethodType(dequantize, layer)


def dequantized(
    weight: Tensor, mode: str, compute_dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """What ``mode`` leaves of a weight matrix [out, in], as ``quantize_linear`` stores it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return dequantize(quantize_linear(linear, mode, compute_dtype, device))


def int8_state(layer: bnb.nn.Linear8bitLt) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] and row scales [out]; the first forward moves them into ``state``."""
    weight: Any = layer.weight
    state: Any = layer.state
    for holder in (weight, state):
        if holder.CB is not None:
            return holder.CB, holder.SCB
    raise QuantizationFailed(f"a {type(layer).__name__} holds no int8 codes: it was not quantized")


def state_tensors(layer: nn.Module) -> list[Tensor]:
    """What a quantized layer holds beside its weight and bias: scales, codebooks, offsets."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return [int8_state(layer)[1]]
    if not isinstance(layer, bnb.nn.Linear4bit):
        return []
    weight: Any = layer.weight
    state = weight.quant_state
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes held by ``tensors``, each once."""
    unique = {(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def quantize_model(
    model: nn.Module, config: QuantizationConfig, compute_dtype: torch.dtype, device: torch.device
) -> list[LayerReport]:
    """Replaces the planned layers in place, measures each against its original, and proves it.

    Raises ``QuantizationFailed`` when a layer is not what its mode says.
    """
    layers = plan_layers(model, config)
    linears = block_linears(model)
    reports = []
    for mode, in_features in sorted({(m, linears[n].in_features) for n, m in layers.items()}):
        check_kernel(mode, in_features, str(device))
    for name, mode in layers.items():
        original = linears[name]
        quantized = quantize_linear(original, mode, compute_dtype, device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)
        reports.append(_measure(name, mode, original.weight.detach(), quantized))
    for report in reports:
        _prove(report)
    tell_peft(model, set(layers.values()))
    return reports


def tell_peft(model: nn.Module, modes: set[str]) -> None:
    """Without these marks PEFT wraps a quantized layer as a plain one, without an error."""
    model.is_loaded_in_8bit = "int8" in modes  # type: ignore[assignment]
    model.is_loaded_in_4bit = bool(modes - {"int8"})  # type: ignore[assignment]


def _measure(name: str, mode: str, original: Tensor, layer: nn.Module) -> LayerReport:
    quantized = cast(Tensor, layer.weight).data
    weights = original.float().to(quantized.device)
    return LayerReport(
        name=name,
        mode=mode,
        layer_class=type(layer).__name__,
        dtype=str(quantized.dtype).removeprefix("torch."),
        shape=(original.shape[0], original.shape[1]),
        weight_bytes=tensor_bytes([quantized]),
        state_bytes=tensor_bytes(state_tensors(layer)),
        error_norm=float((weights - dequantize(layer)).norm()),
        weight_norm=float(weights.norm()),
    )


def _prove(report: LayerReport) -> None:
    expected = ("Linear8bitLt", "int8") if report.mode == "int8" else ("Linear4bit", "uint8")
    bits = 8 if report.mode == "int8" else 4
    if (report.layer_class, report.dtype) != expected:
        raise QuantizationFailed(
            f"{report.name} should be {expected}, and is {(report.layer_class, report.dtype)}"
        )
    if report.weight_bytes != report.shape[0] * report.shape[1] * bits // 8:
        raise QuantizationFailed(f"{report.name}: {report.weight_bytes} bytes are not {bits} bit")
    if not 0 < report.relative_error < WEIGHT_ERROR_LIMITS[report.mode]:
        raise QuantizationFailed(
            f"{report.name}: the weight error {report.relative_error:.4f} is outside "
            f"(0, {WEIGHT_ERROR_LIMITS[report.mode]}) of {report.mode}"
        )


@functools.cache
def check_kernel(mode: str, in_features: int, device: str) -> float:
    """Quantizes Gaussian weights [128, in_features] on ``device``: their relative error.

    Raises ``QuantizationFailed`` when it is outside the mode's band. bitsandbytes 0.50.2 fails so
    on the CPU in 4 bit when ``in_features`` is not a multiple of the block of 64 weights.
    """
    weights = torch.empty(128, in_features).normal_(generator=torch.Generator().manual_seed(0))
    left = dequantized(weights, mode, torch.float32, device).cpu()
    error = float((weights - left).norm() / weights.norm())
    low, high = GAUSSIAN_ERROR_BANDS[mode]
    if not low < error < high:
        raise QuantizationFailed(
            f"quantization.mode = {mode}: on {device}, bitsandbytes {bnb.__version__} returns "
            f"Gaussian weights of {in_features} columns with a relative error of {error:.3f} "
            f"instead of {low} to {high}; choose another mode, model or device"
        )
    return error
