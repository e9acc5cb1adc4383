"""How the adapters begin, where that is a matter of the base layers' full-precision weights.

At the start a layer computes with ``base + scaling * B A``. Drawn adapters add nothing to it; those
of this module do, and the base is what they leave:

- ``pissa``: the principal singular values and vectors of W; the rest W - scaling * B A stays the
  base. Quantized, that is QPiSSA (Meng et al. 2024, arXiv 2404.02948, section 4).
- ``olora``: the first columns of Q and rows of R of W = Q R (Buyukakyuz 2024, arXiv 2406.01775).
- ``loftq``: Q = q(W - scaling * B A) and B A = SVD_r(W - Q) / scaling in turn (Li et al. 2023,
  arXiv 2310.08659, algorithm 1), with the quantizer q of the layer's own mode. PEFT's own leaves
  ``scaling`` out, and is right for 1 alone. At full precision Q is W and nothing is left to make
  good: such a layer begins as by ``default``, so that the baseline of LoftQ is plain LoRA.

All is computed on the CPU in float32 before quantization, so that the modes that are compared take
the same part of the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tune_study.config import LoraSpec, TrialConfig
from tune_study.model.layers import adapted_layers, plan_layers
from tune_study.model.quantize import dequantize, dequantized

Quantizer = Callable[[Tensor], Tensor]
"""Weights [out, in] -> what is left of them once they were quantized."""


class Factors(NamedTuple):
    """The first values of a layer's adapter, float32 on the CPU."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""

    def product(self, scaling: float) -> Tensor:
        """What they add to the layer's weights: [out, in]."""
        return scaling * self.b @ self.a


class Beginning(NamedTuple):
    """What was taken of a base model before its quantization. Layers by name."""

    factors: dict[str, Factors]
    """Of the adapters that are not drawn."""
    weights: dict[str, Tensor]
    """Full-precision weights [out, in] of all layers that begin otherwise than by adding zero."""


class InitialError(NamedTuple):
    """One adapted layer at the start against its full-precision weights W; Frobenius norms."""

    error_norm: float
    """||W - (base + scaling * B A)||, and with DoRA's magnitudes where the layer has them."""
    alone_norm: float
    """||W - q(W)||: what quantization alone would leave."""
    weight_norm: float


def take(
    base: nn.Module,
    config: TrialConfig,
    device: torch.device,
    compute_dtype: torch.dtype,
    given: Mapping[str, Factors] | None = None,
) -> Beginning:
    """The factors that ``config`` wants, or those ``given``; ``base`` keeps what they leave.

    ``base`` is at full precision, and its weights are replaced in place.
    """
    lora, found = config.lora, Beginning({}, {})
    if not (lora.begins_with_weights or lora.use_dora or given):
        return found
    modes = plan_layers(base, config.quantization)
    for name in adapted_layers(base, lora, config.model)[1]:
        layer = cast(nn.Linear, base.get_submodule(name))
        weight = layer.weight.detach().to("cpu", copy=True)
        rest = weight
        if given is not None:
            factors = given.get(name)
            rest = weight if factors is None else weight - factors.product(lora.scaling_of(name))
        else:
            mode = modes.get(name, "none")
            quantizer = _quantizer(mode, compute_dtype, device) if mode != "none" else None
            factors, rest = _factors(weight, lora, name, quantizer)
        if factors is not None:
            found.factors[name] = factors
            layer.weight.data.copy_(rest)
        if factors is not None or lora.use_dora:
            found.weights[name] = weight
    return found


def _quantizer(mode: str, compute_dtype: torch.dtype, device: torch.device) -> Quantizer:
    return lambda weight: dequantized(weight, mode, compute_dtype, device).cpu()


def _factors(
    weight: Tensor, lora: LoraSpec, name: str, quantizer: Quantizer | None
) -> tuple[Factors | None, Tensor]:
    """(the factors, what the base keeps); ``None`` where the adapter is drawn."""
    r, scaling, how = lora.rank_of(name), lora.scaling_of(name), lora.init_lora_weights
    if how == "loftq":
        if quantizer is None:
            return None, weight
        return loftq(weight, r, scaling, quantizer, lora.loftq_iter)
    if how == "olora":
        factors = orthonormal(weight, r)
    elif how.startswith("pissa"):
        steps = how.partition("_niter_")[2]
        factors = principal(weight, r, scaling, int(steps) if steps else None)
    else:
        return None, weight
    return factors, weight - factors.product(scaling)


def principal(weight: Tensor, r: int, scaling: float, niter: int | None = None) -> Factors:
    """PiSSA's: B A * scaling is the best approximation of ``weight`` [out, in] of rank ``r``.

    ``niter`` steps of a randomized decomposition, by torch's generator, or the exact one.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=niter)
        vh = v.T
    root = torch.diag(torch.sqrt(s[:r] / scaling))
    return Factors(root @ vh[:r], u[:, :r] @ root)


def orthonormal(weight: Tensor, r: int) -> Factors:
    """OLoRA's: B with orthonormal columns, A the rows of R beside them."""
    q, upper = torch.linalg.qr(weight)
    return Factors(upper[:r].contiguous(), q[:, :r].contiguous())


def loftq(
    weight: Tensor, r: int, scaling: float, quantizer: Quantizer, iterations: int
) -> tuple[Factors, Tensor]:
    """LoftQ's factors, and the weights whose quantization they were made for."""
    rest = weight
    factors = principal(weight - quantizer(rest), r, scaling)
    for _ in range(iterations - 1):
        rest = weight - factors.product(scaling)
        factors = principal(weight - quantizer(rest), r, scaling)
    return factors, rest


@torch.no_grad()
def orthogonal_(layer: Any) -> None:
    """PEFT's ``orthogonal`` for any base layer: B A is 0, and neither of them is.

    A takes the odd and B the even rows of one orthogonal matrix [r, r].
    """
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    r = len(a)
    rows, _ = torch.linalg.qr(torch.randn(r, r))
    a.copy_((torch.randn(a.shape[1], r // 2) @ rows[0::2]).T / 10)
    b.copy_(torch.randn(r // 2, b.shape[0]).T @ rows[1::2] / 10)


@torch.no_grad()
def begin(layer: Any, how: str, factors: Factors | None, weight: Tensor | None) -> None:
    """Gives a layer of PEFT's its first values: ``factors``, or drawn as ``how`` says.

    DoRA's magnitudes are the row norms of the full-precision ``weight``, where PEFT, given a
    quantized base, would take those of the quantized one: so the modes that are compared begin
    with the same.
    """
    # Drawn in any case, so that a layer draws the same whatever the others do.
    layer.reset_lora_parameters("default", "gaussian" if how == "gaussian" else True)
    a = layer.lora_A["default"].weight
    if how == "orthogonal" and a.device.type != "meta":
        orthogonal_(layer)
    if factors is not None:
        a.copy_(factors.a)
        layer.lora_B["default"].weight.copy_(factors.b)
    if weight is not None and "default" in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector["default"].weight.copy_(torch.linalg.norm(weight, dim=1))


@torch.no_grad()
def effective_weight(layer: Any) -> Tensor:
    """The weights [out, in] that a layer of PEFT's computes with now, float32 on the CPU."""
    base = layer.base_layer
    weight = base.weight if type(base) is nn.Linear else dequantize(base)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    total = weight.cpu() + layer.scaling["default"] * b.cpu() @ a.cpu()
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight.cpu()
        total *= (magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1)
    return total


def lora_layers(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """(name in the base model, layer) of every adapted layer of a ``PeftModel``."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def measure(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    modes: Mapping[str, str],
    compute_dtype: torch.dtype,
    device: torch.device,
) -> dict[str, InitialError]:
    """The layers of ``weights`` as they begin in ``model``, a ``PeftModel`` that was just built."""
    found = {}
    for name, layer in lora_layers(model):
        if (weight := weights.get(name)) is None:
            continue
        alone, mode = 0.0, modes.get(name, "none")
        if mode != "none":
            alone = float((weight - _quantizer(mode, compute_dtype, device)(weight)).norm())
        error = float((weight - effective_weight(layer)).norm())
        found[name] = InitialError(error, alone, float(weight.norm()))
    return found


@contextmanager
def added_by_training(
    model: PeftModel, factors: Mapping[str, Factors]
) -> Iterator[dict[str, Tensor] | None]:
    """The state of ``model`` without what its adapters took of the base, as LoRA of twice the rank.

    The first half of every A and B is what was trained, the second the first values, B's negated.
    Within, PEFT's configuration of the model has the rank and alpha of that. ``None``, and nothing
    changed, where ``factors`` is empty.
    """
    if not factors:
        yield None
        return
    state = model.state_dict()
    for name, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        first = factors.get(name) or Factors(torch.zeros_like(a), torch.zeros_like(b))
        prefix = f"base_model.model.{name}.lora_"
        state[f"{prefix}A.default.weight"] = torch.cat([a.detach(), first.a.to(a.device)])
        state[f"{prefix}B.default.weight"] = torch.cat([b.detach(), -first.b.to(b.device)], 1)
    trained = cast(Any, model.peft_config["default"])
    # The scaling stays: alpha / r, or alpha / sqrt(r).
    times = math.sqrt(2) if trained.use_rslora else 2
    model.peft_config["default"] = dataclasses.replace(
        trained,
        r=2 * trained.r,
        lora_alpha=times * trained.lora_alpha,
        rank_pattern={name: 2 * r for name, r in trained.rank_pattern.items()},
        alpha_pattern={name: times * alpha for name, alpha in trained.alpha_pattern.items()},
    )
    try:
        yield state
    finally:
        model.peft_config["default"] = trained
