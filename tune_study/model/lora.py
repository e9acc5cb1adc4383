"""A LoRA layer's forward and backward pass in fewer passes over memory than PEFT's own.

    y = base(x) + scaling * B A dropout(x)                      (LoRA, Hu et al. 2021, section 4.1)

PEFT copies the input and the base layer's output, casts, multiplies by ``scaling`` and adds, each
over a whole activation. Here the sum is part of the product with ``B``, ``scaling`` and dropout's
divisor are multiplied into ``A`` and ``B``, which are small, and ``x`` is cast to the compute dtype
once, for the base layer and the adapter together. benchmarks/README.md has what that is worth.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tune_study.config import LoraSpec
from tune_study.model import noise_scale
from tune_study.model.quantize import autocasted


def why_pefts_own(lora: LoraSpec) -> str | None:
    """Why layers of ``lora`` compute by PEFT's own forward pass; ``None`` where this one serves."""
    if not (lora.use_dora or lora.lora_bias):
        return None
    field = "lora.use_dora" if lora.use_dora else "lora.lora_bias"
    return f"{field} = true: the adapted layers compute by PEFT's own pass, slower than plain LoRA"


def speed_up(layer: nn.Module) -> None:
    """Gives PEFT's LoRA ``layer`` the forward pass of this module. Its class stays."""
    layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """[..., in_features] -> [..., out_features]; PEFT's own where the adapter is off or merged."""
    if layer.disable_adapters or layer.merged:
        return cast(Tensor, type(layer).forward(layer, x))
    x = autocasted(x)
    base = layer.base_layer(x)
    dropout = layer.lora_dropout["default"]  # an nn.Identity for p = 0
    p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _AddAdapter.apply(base, x, a, b, layer.scaling["default"], p))


class _AddAdapter(torch.autograd.Function):
    """base + scaling * dropout(x) a^T b^T, in the dtype of ``base`` and ``x``, in base's memory.

    base [..., out], x [..., in], a [r, in], b [out, r]. ``base`` must be fresh from its layer: the
    sum takes its place, without autograd's knowledge, because no layer's backward pass needs its
    own output. For backward it keeps the dropped input, its mask of a byte an element, and what has
    the width of the rank.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float
    ) -> Tensor:
        rows, mask, kept = x, None, 1.0
        if p:
            mask, kept = draw_mask(x, p)
            rows = drop(x, mask)
        rows = rows.flatten(0, -2)
        ctx.factors, ctx.dtype = (1 / kept, scaling), a.dtype
        ctx.first_half, ctx.learned = noise_scale.receiver(), (a, b)
        a, b = (a / kept).to(rows.dtype), (b * scaling).to(rows.dtype)
        inner = rows @ a.T
        ctx.save_for_backward(rows, mask, inner, a, b)
        base.view(-1, base.shape[-1]).addmm_(inner, b.T)
        return base.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, mask, inner, a, b = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        through = gradient @ b
        into_x = None
        if ctx.needs_input_grad[1]:
            # No view: autograd adds the base layer's share in place to a tensor of its own only.
            into_x = through.unflatten(0, gradients[0].shape[:-1]) @ a
            into_x = into_x if mask is None else drop(into_x, mask)
        divided, scaling = ctx.factors

        def learned(part: slice) -> tuple[Tensor, Tensor]:
            of_a = (through[part].T @ rows[part]).to(ctx.dtype).mul_(divided)
            # gradient.T @ inner, which takes three times as long on the CPU.
            of_b = (inner[part].T @ gradient[part]).T.to(ctx.dtype).contiguous().mul_(scaling)
            return of_a, of_b

        if ctx.first_half is not None:
            half = slice(len(rows) // 2)
            ctx.first_half.update(zip(ctx.learned, learned(half), strict=True))
        return gradients[0], into_x, *learned(slice(None)), None, None


def drop(x: Tensor, mask: Tensor) -> Tensor:
    """A copy of ``x`` that is 0 where ``mask`` is false. On the CPU four times as fast as where."""
    # The bits of x as a whole number, times 1 or 0: for the CPU, bytes are 3 times as slow to turn
    # into bf16 as into integers.
    whole = x.device.type == "cpu" and x.dtype == torch.bfloat16
    number = torch.int16 if whole else x.dtype
    return mask.view(torch.uint8).to(number).mul_(x.view(number)).view(x.dtype)


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """(which elements of ``x`` dropout keeps, as booleans of its shape; the share that it keeps).

    torch's own dropout on the CPU draws one number per element, serially. Here each 64-bit draw of
    the same generator decides eight elements: a byte below ``256 p`` drops its own. Where that is
    no whole number, each feature takes the one below or above it, drawn so that every element is
    dropped with probability p (at most 255/256). That two rows share a feature's number correlates
    their masks by less than 1 / (2**18 p (1 - p)): 0.00004 for p = 0.1.
    """
    if x.device.type != "cpu":
        kept = max(1, round((1 - p) * 2**16)) / 2**16
        return torch.rand(x.shape, device=x.device) < kept, kept
    dropped = min(256 * p, 255.0)
    bound = int(dropped) + (torch.rand(x.shape[-1]) < dropped % 1).to(torch.uint8)
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    # In place: torch compares ten times as fast where the dtype stays.
    mask = draws.view(torch.uint8)[: x.numel()].view(x.shape).ge_(bound)
    return mask.view(torch.bool), 1 - dropped / 256
