"""A LoRA layer's forward and backward pass in fewer passes over memory than PEFT's own.

    y = base(x) + scaling * B A dropout(x)                      (LoRA, Hu et al. 2021, section 4.1)

PEFT copies the input and the base layer's output, casts, multiplies by ``scaling`` and adds, each
over a whole activation. Here the sum is part of the product with ``B``, ``scaling`` and dropout's
divisor are multiplied into ``A`` and ``B``, which are small, and ``x`` is cast to the compute dtype
once, for the base layer and the adapter together. benchmarks/README.md has what that is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, cast

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


def speed_up(model: nn.Module, layers: Sequence[Any]) -> None:
    """Gives PEFT's LoRA ``layers`` of ``model`` the forward pass of this module. Their class stays.

    A pass of ``model`` begins with all their A and B at once: a few kernels on a GPU, where each
    layer for itself launches four.
    """
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    model.register_forward_pre_hook(partial(_prepare, layers))
    model.register_forward_hook(partial(_forget, layers), always_call=True)


class _Adapter(NamedTuple):
    """A layer's A [r, in] and B [out, r] as they learn, and what they are multiplied by."""

    a: Tensor
    b: Tensor
    scaling: float
    p: float
    """Of the dropout before A; 0 in evaluation."""


def _adapter_of(layer: Any) -> _Adapter:
    dropout = layer.lora_dropout["default"]  # an nn.Identity for p = 0
    p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _Adapter(a, b, layer.scaling["default"], p)


@torch.no_grad()
def _scaled(adapters: Sequence[_Adapter], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(A over the share that dropout keeps, B times scaling) of each, in ``dtype``."""
    divisors = [_divisor(adapter.p, adapter.a.device) for adapter in adapters]
    a = torch._foreach_div([adapter.a for adapter in adapters], divisors)
    b = torch._foreach_mul(
        [adapter.b for adapter in adapters], [adapter.scaling for adapter in adapters]
    )
    both = [*a, *b]
    if both[0].dtype != dtype:
        narrow = [torch.empty_like(tensor, dtype=dtype) for tensor in both]
        torch._foreach_copy_(narrow, both)
        both = narrow
    return list(zip(both[: len(a)], both[len(a) :], strict=True))


def _prepare(layers: Sequence[Any], *_: Any) -> None:
    acting = [layer for layer in layers if not (layer.disable_adapters or layer.merged)]
    if acting:
        adapters = [_adapter_of(layer) for layer in acting]
        dtype = autocasted(adapters[0].a[:0]).dtype
        for layer, pair in zip(acting, _scaled(adapters, dtype), strict=True):
            vars(layer)["prepared"] = pair


def _forget(layers: Sequence[Any], *_: Any) -> None:
    """A and B will have learned by the next pass, and what is computed again finds its own."""
    for layer in layers:
        vars(layer).pop("prepared", None)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """[..., in_features] -> [..., out_features]; PEFT's own where the adapter is off or merged."""
    if layer.disable_adapters or layer.merged:
        return cast(Tensor, type(layer).forward(layer, x))
    x = autocasted(x)
    base, prepared = layer.base_layer(x), vars(layer).get("prepared")
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _AddAdapter.apply(base, x, *_adapter_of(layer), prepared))


class _AddAdapter(torch.autograd.Function):
    """base + scaling * dropout(x) a^T b^T, in the dtype of ``base`` and ``x``, in base's memory.

    base [..., out], x [..., in], a [r, in], b [out, r]; ``prepared``, where given, is ``_scaled``
    of a and b in the dtype of x. ``base`` must be fresh from its layer: the sum takes its place,
    without autograd's knowledge, because no layer's backward pass needs its own output. For
    backward it keeps the dropped input, its mask of a byte an element, and what has the width of
    the rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        p: float,
        prepared: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rows, mask = dropped(x, p) if p else (x, None)
        rows = rows.flatten(0, -2)
        ctx.factors, ctx.dtype, ctx.p = (1 / _divisor(p, x.device), scaling), a.dtype, p
        ctx.first_half, ctx.learned = noise_scale.receiver(), (a, b)
        if prepared is None or prepared[0].dtype != rows.dtype:
            (prepared,) = _scaled([_Adapter(a, b, scaling, p)], rows.dtype)
        a, b = prepared
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
            into_x = into_x if mask is None else _dropped_again(into_x, mask, ctx.p)
        divided, scaling = ctx.factors

        def learned(part: slice) -> tuple[Tensor, Tensor]:
            of_a = (through[part].T @ rows[part]).to(ctx.dtype).mul_(divided)
            # gradient.T @ inner, which takes three times as long on the CPU.
            of_b = (inner[part].T @ gradient[part]).T.to(ctx.dtype).contiguous().mul_(scaling)
            return of_a, of_b

        if ctx.first_half is not None:
            half = slice(len(rows) // 2)
            ctx.first_half.update(zip(ctx.learned, learned(half), strict=True))
        return gradients[0], into_x, *learned(slice(None)), None, None, None


ONE_KERNEL = {"cuda"}
"""Devices on which torch's own dropout draws, drops and divides by the share in one kernel."""


def dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(``x`` with elements at 0, each with probability ``p``; which of them are kept).

    What is kept is as it was, or, on the devices of ``ONE_KERNEL``, divided by 1 - p.
    """
    if x.device.type in ONE_KERNEL:
        return torch.native_dropout(x, p, True)
    mask = draw_mask(x, p)
    return drop(x, mask), mask


def _dropped_again(gradient: Tensor, mask: Tensor, p: float) -> Tensor:
    """What reaches x of the ``gradient`` of ``dropped(x, p)``."""
    if gradient.device.type in ONE_KERNEL:
        return torch.ops.aten.native_dropout_backward(gradient, mask, 1 / (1 - p))
    return drop(gradient, mask)


def kept_share(p: float, device: torch.device) -> float:
    """The share of the elements that dropout keeps on ``device``: 1 - p, or the nearest to it."""
    if device.type in ONE_KERNEL:
        return 1 - p
    if device.type != "cpu":
        return max(1, round((1 - p) * 2**16)) / 2**16
    return 1 - min(256 * p, 255.0) / 256


def _divisor(p: float, device: torch.device) -> float:
    """By what A is divided: the share that dropout keeps, where ``dropped`` has not done so."""
    return 1.0 if device.type in ONE_KERNEL else kept_share(p, device)


def drop(x: Tensor, mask: Tensor) -> Tensor:
    """A copy of ``x`` that is 0 where ``mask`` is false. On the CPU four times as fast as where."""
    # The bits of x as a whole number, times 1 or 0: for the CPU, bytes are 3 times as slow to turn
    # into bf16 as into integers.
    whole = x.device.type == "cpu" and x.dtype == torch.bfloat16
    number = torch.int16 if whole else x.dtype
    return mask.view(torch.uint8).to(number).mul_(x.view(number)).view(x.dtype)


def draw_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of ``x`` dropout keeps, as booleans of its shape: ``kept_share`` of them.

    torch's own dropout on the CPU draws one number per element, serially. Here each 64-bit draw of
    the same generator decides eight elements: a byte below ``256 p`` drops its own. Where that is
    no whole number, each feature takes the one below or above it, drawn so that every element is
    dropped with probability p (at most 255/256). That two rows share a feature's number correlates
    their masks by less than 1 / (2**18 p (1 - p)): 0.00004 for p = 0.1.
    """
    if x.device.type != "cpu":
        return torch.rand(x.shape, device=x.device) < kept_share(p, x.device)
    below = min(256 * p, 255.0)
    bound = int(below) + (torch.rand(x.shape[-1]) < below % 1).to(torch.uint8)
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    # In place: torch compares ten times as fast where the dtype stays.
    mask = draws.view(torch.uint8)[: x.numel()].view(x.shape).ge_(bound)
    return mask.view(torch.bool)
