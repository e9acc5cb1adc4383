"""Dropout whose masks cost the CPU a third of ``nn.Dropout``'s (benchmarks/README.md)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """``nn.Dropout``; on the CPU with masks of its own.

    There torch draws one number of the generator per element, serially. Here each 64-bit draw of
    the same generator decides four elements, 16 bits each, and what is kept for backward is a
    byte an element instead of a number. So ``p`` is rounded to a multiple of 2**-16, and kept
    elements are divided by exactly the share that is kept, so that the mean stays that of ``x``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as ``x``."""
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return nn.functional.dropout(x, self.p, self.training)
        return cast(Tensor, _Masked.apply(x, max(1, round((1 - self.p) * 2**16))))

    def extra_repr(self) -> str:
        """As ``nn.Dropout``'s."""
        return f"p={self.p}"


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: int) -> Tensor:
        """``kept`` of 2**16 elements stay."""
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        mask = draws.view(torch.int16)[: x.numel()].view(x.shape) <= kept - 2**15 - 1
        ctx.save_for_backward(mask)
        ctx.scale = 2**16 / kept
        return x * mask.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask.to(gradients[0].dtype).mul_(ctx.scale), None
