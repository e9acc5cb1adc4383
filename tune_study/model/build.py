"""``build_model``: a timm Vision Transformer, quantized, with PEFT's LoRA; every step proven."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tune_study.config import TrialConfig
from tune_study.data.batches import Preprocessing
from tune_study.errors import UserError
from tune_study.model.footprint import base_bytes, bytes_at
from tune_study.model.layers import adapted, block_linears, block_ranges, refuse_without_effect
from tune_study.model.lora import speed_up
from tune_study.model.noise_scale import watch
from tune_study.model.quantize import (
    LayerReport,
    QuantizationFailed,
    quantize_model,
    tensor_bytes,
)
from tune_study.model.weights import classifier_names, load_base

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEFT_CLASSES = {
    "none": "peft.tuners.lora.layer.Linear",
    "int8": "peft.tuners.lora.bnb.Linear8bitLt",
    "4bit": "peft.tuners.lora.bnb.Linear4bit",
}


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
    """Base model as built: weights, quantization state, and the residue at full precision."""

    quantizable_bytes: int
    """Of the block layers' weights as built, quantization state included: all that it can touch."""

    @property
    def quantized_blocks(self) -> str:
        """The blocks with quantized layers, as ``layers.block_ranges`` writes them."""
        return block_ranges(layer.name for layer in self.layers)

    @property
    def quantization_error(self) -> float:
        """||W - dequantized W|| / ||W|| over all quantized layers together; 0 when there are none.

        Frobenius norms, relative to full precision.
        """
        if not self.layers:
            return 0.0
        error = math.fsum(layer.error_norm**2 for layer in self.layers)
        return math.sqrt(error / math.fsum(layer.weight_norm**2 for layer in self.layers))


def build_model(
    config: TrialConfig,
    num_classes: int,
    *,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
) -> BuiltModel:
    """A fresh model for one trial: timm, then quantization, then LoRA, then the proofs.

    The seed decides the new head and the adapters (and, with ``pretrained=false``, the base),
    equally in every quantization mode. Raises ``UserError`` for a model, a weights file or a
    setting that does not fit, and ``QuantizationFailed`` when a proof fails.
    """
    device = torch.device(device)
    torch.manual_seed(config.seed)
    base = load_base(config, num_classes, weights).to(device)
    base.requires_grad_(False)
    choose_attention(base, config, device)
    tensors = [*base.parameters(), *base.buffers()]
    block_weights = {f"{name}.weight" for name in block_linears(base)}
    residue = [p for n, p in base.named_parameters() if n not in block_weights]
    residue_bytes = tensor_bytes([*residue, *base.buffers()])
    base_parameters = sum(tensor.numel() for tensor in tensors)
    full_bytes = bytes_at(tensors, 4), bytes_at(tensors, 2)
    refuse_without_effect(base, config)
    compute_dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    layers = quantize_model(base, config.quantization, compute_dtype, device)
    weights_bytes = base_bytes(base)
    preprocessing = preprocessing_of(base, config)
    if config.training.gradient_checkpointing:
        checkpoint_blocks(base, config.model)
        if device.type == "mps":
            draw_again_in_recomputation(base)
    model = add_lora(base, config)
    model.to(device)
    quantizable = weights_bytes - residue_bytes
    built = BuiltModel(
        model, layers, preprocessing, base_parameters, *full_bytes, weights_bytes, quantizable
    )
    _prove(built, config)
    return built


def choose_attention(model: nn.Module, config: TrialConfig, device: torch.device) -> None:
    """On the CPU in bf16, plain attention trains faster than the fused one (docs/log.md)."""
    if device.type == "cpu" and config.training.compute_dtype == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]


def preprocessing_of(model: nn.Module, config: TrialConfig) -> Preprocessing:
    """timm's data configuration of ``model`` at the trial's image size."""
    wanted = resolve_model_data_config(model)
    size = config.data.image_size or wanted["input_size"][-1]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
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


def add_lora(base: nn.Module, config: TrialConfig) -> PeftModel:
    """LoRA on the target layers and a trained copy of the head. Raises ``UserError``."""
    pattern, _ = adapted(base, config.lora.target_modules, config.model)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=pattern,
        # The head is new for this data set: it must be trained, whole.
        modules_to_save=classifier_names(base),
    )
    model = get_peft_model(base, lora)
    # PEFT draws a different count of random numbers for 4-bit layers: drawn anew, the adapters of
    # one seed are the same in all modes that are compared.
    torch.manual_seed(config.seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)
            speed_up(module)
        elif isinstance(module, ModulesToSaveWrapper):
            watch(cast(nn.Linear, module.modules_to_save["default"]))
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by a short name such as ``blocks.0.attn.qkv.lora_A``."""
    return {
        re.sub(r"(lora_[AB])\.default\.weight$", r"\1", name)
        .removeprefix("base_model.model.")
        .replace("modules_to_save.default.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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
    strangers = [
        name
        for name, parameter in learning.items()
        if parameter.dtype != torch.float32
        or not (".lora_" in name or name.split(".")[0] in _heads(built.model))
    ]
    if found == 0 or strangers:
        raise QuantizationFailed(f"{found} LoRA layers; unexpected trainable: {strangers[:3]}")
    if not any(name.split(".")[0] in _heads(built.model) for name in learning):
        raise QuantizationFailed("the head is not trained")
    if config.quantization.mode != "none" and not built.layers:
        raise QuantizationFailed(f"quantization {config.quantization.mode} quantized no layer")


def _heads(model: PeftModel) -> set[str]:
    return {name.split(".")[0] for name in classifier_names(model.get_base_model())}
