"""int8 layers that only queue work, as a CUDA graph needs them.

LLM.int8() computes the input columns that hold an outlier in 16 bit and all others in int8
(Dettmers et al. 2022, section 3). bitsandbytes asks the device which those are, and waits for the
answer; a graph cannot wait, and its shapes are fixed. Here all columns are sorted, the outliers
first and in their order, and as many as there is room for are multiplied, those that are none as
zeros. Each sum has the terms of bitsandbytes' own, in their order; the zeros come after them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor, nn

from tune_study.errors import UserError
from tune_study.model.quantize import INT8_THRESHOLD, int8_state, outside_autocast

ROOM = 1024
"""Outlier columns that a layer has room for, or all where it has fewer. Pretrained ViTs have up to
276 of 384 behind a norm, and more the more images are looked at (docs/log.md, 2026-11-28)."""


class Outliers(NamedTuple):
    """What the layers with more columns than ``ROOM`` have met."""

    names: list[str]
    met: Tensor
    """Most outlier columns of each at once: int64, on the device, where it stays."""

    def refuse_more_than_room(self) -> None:
        """Reads the device. Raises ``UserError`` where a product has left columns out."""
        for name, met in zip(self.names, self.met.tolist(), strict=True):
            if met > ROOM:
                raise UserError(
                    f"training.step = graph: {name} has met {met} outlier columns at once, and a "
                    f"graph has room for {ROOM}; set training.step=eager"
                )


def make_static(model: nn.Module) -> Outliers:
    """Gives the int8 layers of ``model``, quantized already, the forward pass of this module."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}
    wide = [name for name, layer in layers.items() if layer.in_features > ROOM]
    met = torch.zeros(len(wide), dtype=torch.int64, device=next(model.parameters()).device)
    counts: dict[str, Tensor] = dict(zip(wide, met, strict=True))
    for name, layer in layers.items():
        compute = partial(_compute, room=ROOM, met=counts.get(name))
        vars(layer)["forward"] = partial(outside_autocast, layer, compute=compute)
    names = [n.removeprefix("base_model.model.").removesuffix(".base_layer") for n in wide]
    return Outliers(names, met)


def _compute(layer: Any, x: Tensor, *, room: int, met: Tensor | None) -> Tensor:
    """As ``Linear8bitLt.forward``, with the product of this module."""
    if layer.bias is not None and layer.bias.dtype != x.dtype:
        layer.bias.data = layer.bias.data.to(x.dtype)
    return cast(Tensor, Product.apply(x, *int8_state(layer), layer.bias, room, met))


class Product(torch.autograd.Function):
    """x W^T + bias as ``bitsandbytes.MatMul8bitLt`` with frozen weights: [..., in] -> [..., out].

    codes int8 [out, in], scales float32 [out]. ``met`` is raised to the count of outlier columns.
    It keeps nothing for backward but the weights, where bitsandbytes keeps ``x`` as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        room: int,
        met: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.shape, ctx.dtype = (codes, scales), x.shape, x.dtype
        rows = x.flatten(0, -2)
        taken, row_scales, columns = _apart(rows)
        if met is not None:
            torch.maximum(met, columns.sum(), out=met)
        is_outlier, order = columns.byte().sort(descending=True, stable=True)
        is_outlier, order = is_outlier[:room], order[:room]
        out: Tensor = torch.ops.bitsandbytes.int8_scaled_mm(
            taken, codes, row_scales, scales, bias=bias, dtype=x.dtype
        )
        outliers = rows.index_select(1, order).masked_fill_(is_outlier == 0, 0)
        weights = torch.ops.bitsandbytes.int8_vectorwise_dequant(
            codes.index_select(1, order), scales
        )
        return out.addmm_(outliers, weights.to(x.dtype).t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.weight
        weights = codes.to(ctx.dtype).mul_(scales.unsqueeze(1).mul(1 / 127))
        gradient = gradients[0].flatten(0, -2).contiguous().to(ctx.dtype)
        return (gradient @ weights).view(ctx.shape), None, None, None, None, None


def _apart(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 codes of [n, in] ``rows``, zero in outlier columns; scales [n]; which those are)."""
    half = rows.to(torch.float16)
    outliers = half.abs() >= INT8_THRESHOLD
    columns = outliers.any(0)
    codes, scales, _ = int8_vectorwise_quant(half.masked_fill(outliers, 0))
    return codes.masked_fill_(columns, 0), scales, columns
