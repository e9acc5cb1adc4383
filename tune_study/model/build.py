"""``build_model``: a timm Vision Transformer, quantized, with PEFT's LoRA; every step proven."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from tune_study.config import TrialConfig
from tune_study.data.place import Preprocessing
from tune_study.errors import UserError
from tune_study.model.footprint import base_bytes, bytes_at
from tune_study.model.initial import (
    Beginning,
    Factors,
    InitialError,
    begin,
    lora_layers,
    measure,
    take,
)
from tune_study.model.layers import (
    COMPUTE_DTYPES,
    adapted_layers,
    block_linears,
    block_ranges,
    held_in_compute_dtype,
    refuse_without_effect,
    skeleton_of,
)
from tune_study.model.lora import speed_up, why_pefts_own
from tune_study.model.noise_scale import watch
from tune_study.model.quantize import (
    WEIGHT_ERROR_LIMITS,
    LayerReport,
    QuantizationFailed,
    offer_dequantize,
    quantize_model,
    tensor_bytes,
)
from tune_study.model.weights import classifier_names, load_base

PEFT_CLASSES = {
    "none": "peft.tuners.lora.layer.Linear",
    "int8": "peft.tuners.lora.bnb.Linear8bitLt",
    "4bit": "peft.tuners.lora.bnb.Linear4bit",
}


ROUNDING = {"fp32": 1e-4, "bf16": 2**-8}
"""Relative error of weights that were taken apart and added again, by the compute dtype.

Measured in fp32: under 1e-6; bf16 rounds each number by at most 2^-8 of it."""


class BuiltModel(NamedTuple):
    """A model ready to train, and what was proven of it while it was built."""

    model: PeftModel
    layers: list[LayerReport]
    preprocessing: Preprocessing
    base_parameters: int
    """Elements of the base model before quantization, buffers included."""
    bytes_fp32: int
    bytes_16bit: int
    """Of the same base model with 4 and 2 bytes a number; integers keep their own width."""
    weights_bytes: int
    """Base model as built: weights, quantization state, and the residue at full precision.

    Block layers that stay plain are held in the compute dtype, in which they compute."""

    quantizable_bytes: int
    """Of the block layers' weights as built, quantization state included: all that it can touch."""
    factors: dict[str, Factors]
    """First values of the adapters that hold a part of the base, by layer (``initial.py``)."""
    initial: dict[str, InitialError]
    """The layers that do not begin by adding zero, against full precision."""

    @property
    def learning_of_base(self) -> int:
        """Elements of the base model itself that learn (``lora.bias``)."""
        return sum(parameter.numel() for parameter in learning_biases(self.model))

    @property
    def quantized_blocks(self) -> str:
        """The blocks with quantized layers, as ``layers.block_ranges`` writes them."""
        return block_ranges(layer.name for layer in self.layers)

    @property
    def quantization_error(self) -> float:
        """||W - dequantized W|| / ||W|| over all quantized layers together; 0 when there are none.

        Frobenius norms. W is what was quantized: where adapters hold a part of it, the rest.
        """
        if not self.layers:
            return 0.0
        error = math.fsum(layer.error_norm**2 for layer in self.layers)
        return math.sqrt(error / math.fsum(layer.weight_norm**2 for layer in self.layers))

    @property
    def initial_error(self) -> float:
        """The same of what the layers compute with at the start, adapters included, against the
        full-precision weights. The quantization error, where the adapters begin by adding zero."""
        if not self.layers:
            return 0.0
        errors, norms = zip(*(self.initial_norms(layer) for layer in self.layers), strict=True)
        squares = (math.fsum(norm**2 for norm in part) for part in (errors, norms))
        return math.sqrt(next(squares) / next(squares))

    def initial_norms(self, layer: LayerReport) -> tuple[float, float]:
        """(norm of the error at the start, norm of the full-precision weights) of a layer."""
        found = self.initial.get(layer.name)
        if found is None:
            return layer.error_norm, layer.weight_norm
        return found.error_norm, found.weight_norm


def build_model(
    config: TrialConfig,
    num_classes: int,
    *,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    factors: Mapping[str, Factors] | None = None,
) -> BuiltModel:
    """A fresh model for one trial: timm, then quantization, then LoRA, then the proofs.

    ``factors``, where given, are the adapters' first values instead of those that the configuration
    says, and the base keeps what they leave of it. The seed decides the new head and the adapters
    (and, with ``pretrained=false``, the base), equally in every quantization mode. Raises
    ``UserError`` for a model, a weights file or a setting that does not fit, and
    ``QuantizationFailed`` when a proof fails.
    """
    device = torch.device(device)
    torch.manual_seed(config.seed)
    base = load_base(config, num_classes, weights).to(device)
    base.requires_grad_(False)
    choose_attention(base, config, device)
    tensors = [*base.parameters(), *base.buffers()]
    block_weights = {f"{name}.weight" for name in block_linears(base)}
    residue = [p for n, p in base.named_parameters() if n not in block_weights]
    base_parameters = sum(tensor.numel() for tensor in tensors)
    full_bytes = bytes_at(tensors, 4), bytes_at(tensors, 2)
    refuse_without_effect(base, config)
    compute_dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    beginning = take(base, config, device, compute_dtype, factors)
    hold_in(compute_dtype, held_in_compute_dtype(base, config))
    layers = quantize_model(base, config.quantization, compute_dtype, device)
    weights_bytes = base_bytes(base)
    residue_bytes = tensor_bytes([*residue, *base.buffers()])
    preprocessing = preprocessing_of(base, config)
    if config.training.gradient_checkpointing:
        checkpoint_blocks(base, config.model)
        if device.type == "mps":
            draw_again_in_recomputation(base)
    model = add_lora(base, config, beginning)
    model.to(device)
    modes = {layer.name: layer.mode for layer in layers}
    built = BuiltModel(
        model,
        layers,
        preprocessing,
        base_parameters,
        *full_bytes,
        weights_bytes,
        weights_bytes - residue_bytes,
        beginning.factors,
        measure(model, beginning.weights, modes, compute_dtype, device),
    )
    _prove(built, config)
    _prove_beginning(built, config)
    return built


def hold_in(dtype: torch.dtype, parameters: Iterable[Tensor]) -> None:
    """Casts ``parameters`` in place: they stay the same objects."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def choose_attention(model: nn.Module, config: TrialConfig, device: torch.device) -> None:
    """On the CPU in bf16, plain attention trains faster than the fused one (docs/log.md)."""
    if device.type == "cpu" and config.training.compute_dtype == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]


def preprocessing(config: TrialConfig) -> Preprocessing:
    """What the trial's model wants, without building it. Raises ``UserError``."""
    return preprocessing_of(skeleton_of(config.model, 10, config.data.image_size), config)


def preprocessing_of(model: nn.Module, config: TrialConfig) -> Preprocessing:
    """timm's data configuration of ``model`` at the trial's image size."""
    wanted = resolve_model_data_config(model)
    size = config.data.image_size or wanted["input_size"][-1]
    patch, _ = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 1))
    if size % patch:
        raise UserError(
            f"data.image_size = {size}: {config.model} has patches of {patch} px; "
            f"choose a multiple, such as {max(1, round(size / patch)) * patch}"
        )
    interpolation = wanted["interpolation"]
    interpolation = interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"
    return Preprocessing(size, interpolation, tuple(wanted["mean"]), tuple(wanted["std"]))


def checkpoint_blocks(base: nn.Module, name: str) -> None:
    """Switches timm's gradient checkpointing on. Raises ``UserError`` for a model without it."""
    try:
        cast(Any, base).set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"training.gradient_checkpointing = true: {name} has none in timm; leave it false"
        ) from None


def draw_again_in_recomputation(base: nn.Module) -> None:
    """Dropout of a recomputed block draws on MPS what it drew in the forward pass.

    torch's checkpointing sees to that for the generators of the CPU and CUDA alone; without it the
    gradients are those of other masks, and no error tells.
    """
    for name, module in base.named_modules():
        if re.fullmatch(r"(.*\.)?blocks\.\d+", name):
            states: dict[str, Tensor] = {}
            module.register_forward_pre_hook(partial(_before_block, states))
            # Also where torch ends the recomputation early, by an exception.
            module.register_forward_hook(partial(_after_block, states), always_call=True)


def _before_block(states: dict[str, Tensor], *_: Any) -> None:
    if torch._C._current_graph_task_id() < 0:  # the forward pass
        states["forward"] = torch.mps.get_rng_state()
    else:
        states["backward"] = torch.mps.get_rng_state()
        torch.mps.set_rng_state(states["forward"])


def _after_block(states: dict[str, Tensor], *_: Any) -> None:
    if torch._C._current_graph_task_id() >= 0:
        torch.mps.set_rng_state(states["backward"])


def add_lora(base: nn.Module, config: TrialConfig, beginning: Beginning | None = None) -> PeftModel:
    """LoRA on the target layers and a trained copy of the head. Raises ``UserError``.

    ``beginning`` is what was taken of the base; without it all adapters are drawn.
    """
    beginning = beginning or Beginning({}, {})
    spec = config.lora
    pattern, _ = adapted_layers(base, spec, config.model)
    # PEFT's own initialisations would look for the weights in the quantized base: see initial.py.
    lora = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=pattern,
        # The head is new for this data set: it must be trained, whole.
        modules_to_save=classifier_names(base),
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        bias=spec.bias,
        lora_bias=spec.lora_bias,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
    )
    if spec.use_dora:
        offer_dequantize(base)
    model = get_peft_model(base, lora)
    # PEFT draws a different count of random numbers for 4-bit layers: drawn anew, the adapters of
    # one seed are the same in all modes that are compared.
    torch.manual_seed(config.seed)
    layers = dict(lora_layers(model))
    for name, layer in layers.items():
        factors, weight = beginning.factors.get(name), beginning.weights.get(name)
        begin(layer, spec.init_lora_weights, factors, weight)
    if why_pefts_own(spec) is None:
        speed_up(model, list(layers.values()))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            watch(cast(nn.Linear, module.modules_to_save["default"]))
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by a short name such as ``blocks.0.attn.qkv.lora_A``."""
    return {
        re.sub(r"(lora_\w+)\.default(?:\.weight)?(?=$|\.bias$)", r"\1", name)
        .removeprefix("base_model.model.")
        .replace("modules_to_save.default.", "")
        .replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def learning_biases(model: PeftModel) -> list[nn.Parameter]:
    """The parameters of the base model itself that learn (``lora.bias``)."""
    heads = _heads(model)
    return [
        parameter
        for name, parameter in trainable(model).items()
        if ".lora_" not in name and name.split(".")[0] not in heads
    ]


def _prove(built: BuiltModel, config: TrialConfig) -> None:
    """The built model is what the configuration says, or ``QuantizationFailed``."""
    modes = {layer.name: layer.mode for layer in built.layers}
    prefix = "base_model.model."
    found = 0
    for name, module in built.model.named_modules():
        if not hasattr(module, "lora_A") or not name.startswith(prefix):
            continue
        found += 1
        mode = modes.get(name.removeprefix(prefix), "none")
        expected = PEFT_CLASSES["4bit" if "4" in mode else mode]
        actual = f"{type(module).__module__}.{type(module).__qualname__}"
        if actual != expected:
            raise QuantizationFailed(f"{name} is {mode} and should be a {expected}, not a {actual}")
    learning = trainable(built.model)
    adapters = [name.removeprefix(prefix) for name, _ in lora_layers(built.model)]
    strangers = [
        name
        for name, parameter in learning.items()
        if parameter.dtype != torch.float32
        or not (
            ".lora_" in name
            or name.split(".")[0] in _heads(built.model)
            or (name.endswith(".bias") and config.lora.bias == "all")
            or (name.removesuffix(".bias") in adapters and config.lora.bias == "lora_only")
        )
    ]
    if config.lora.bias != "none" and not learning_biases(built.model):
        raise QuantizationFailed(f"lora.bias = {config.lora.bias}: no bias of the base learns")
    if found == 0 or strangers:
        raise QuantizationFailed(f"{found} LoRA layers; unexpected trainable: {strangers[:3]}")
    if not any(name.split(".")[0] in _heads(built.model) for name in learning):
        raise QuantizationFailed("the head is not trained")
    if config.quantization.mode != "none" and not built.layers:
        raise QuantizationFailed(f"quantization {config.quantization.mode} quantized no layer")


def _prove_beginning(built: BuiltModel, config: TrialConfig) -> None:
    """Base and adapters together begin near the full-precision layer, or ``QuantizationFailed``.

    The initialisations made for quantized bases leave less of an error than quantization alone.
    """
    how = config.lora.init_lora_weights
    modes = {layer.name: layer.mode for layer in built.layers}
    for name, found in built.initial.items():
        relative, mode = found.error_norm / found.weight_norm, modes.get(name, "none")
        limit = WEIGHT_ERROR_LIMITS.get(mode, ROUNDING[config.training.compute_dtype])
        if not relative < limit:
            raise QuantizationFailed(
                f"{name}: it begins with a weight error of {relative:.2g} with {mode} and "
                f"lora.init_lora_weights = {how}, over {limit:.2g}"
            )
        closer = found.error_norm < found.alone_norm
        if name in built.factors and mode != "none" and how != "olora" and not closer:
            raise QuantizationFailed(
                f"lora.init_lora_weights = {how}: {name} begins with a weight error of "
                f"{relative:.4g}, and {mode} alone has {found.alone_norm / found.weight_norm:.4g}; "
                "choose another initialisation or rank"
            )


def _heads(model: PeftModel) -> set[str]:
    return {name.split(".")[0] for name in classifier_names(model.get_base_model())}
