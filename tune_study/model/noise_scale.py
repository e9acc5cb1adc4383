"""The gradient noise scale, and what it compares: a batch's gradient with that of its first half.

Both come from one backward pass. A second pass, or two over halves, would draw other dropout masks
and be slower; here a layer that learns multiplies the first half of its rows once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Gradients = dict[Tensor, Tensor]
"""By the parameter itself."""
_receiver: Gradients | None = None


@contextmanager
def gradients_of_first_half(wanted: bool = True) -> Iterator[Gradients]:
    """What is computed forward within also leaves, in backward, the gradients that the first half
    of the batch adds to those of the parameters: LoRA's (``lora.py``) and a watched layer's.
    """
    global _receiver
    found: Gradients = {}
    _receiver = found if wanted else None
    try:
        yield found
    finally:
        _receiver = None


def receiver() -> Gradients | None:
    """Where the gradients of the forward pass that runs now belong; ``None``: nowhere."""
    return _receiver


def watch(layer: nn.Linear) -> None:
    """Makes an ``nn.Linear`` that learns, with rows [images, in_features], leave its own."""
    layer.register_forward_hook(_after_forward)


def _after_forward(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    found = receiver()
    if found is None or not output.requires_grad:
        return
    weight, bias, rows = layer.weight, layer.bias, inputs[0].detach()
    assert isinstance(weight, Tensor)

    def in_backward(gradient: Tensor) -> None:
        half = len(gradient) // 2
        of_weight = gradient[:half].T @ rows[:half].to(gradient.dtype)
        found[weight] = of_weight.to(weight.dtype)
        if isinstance(bias, Tensor):
            found[bias] = gradient[:half].sum(0).to(bias.dtype)

    output.register_hook(in_backward)


class NoiseScale:
    """McCandlish's gradient noise scale (arXiv 1812.06162, appendix A.1), in images.

    From the gradients of equal parts of a batch (B_s images each) and that of the whole (B_b)::

        |G|^2 = (B_b |g_b|^2 - B_s |g_s|^2) / (B_b - B_s)
        S     = (|g_s|^2 - |g_b|^2) / (1/B_s - 1/B_b)

    with |g_s|^2 the mean over the parts: a step's micro-batches, or the halves of its only one.
    Both are noisy and unbiased, so they are averaged over the epoch before they are divided. Each
    image draws its own dropout, which counts as noise. What an epoch of ``steps`` leaves lies in a
    buffer on the device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, steps: int) -> None:
        self._parameters = list(parameters.values())
        device = self._parameters[0].device
        self._row = torch.zeros(2, device=device)
        """The last step's S and |G|^2."""
        self._records = torch.zeros(steps, 2, device=device)
        self._kept = 0
        self.start_step()

    def start_step(self) -> None:
        """Forgets the parts seen so far."""
        self._before: list[Tensor] | None = None
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def observe_part(self, share: float) -> None:
        """After the backward pass of a part whose loss was weighted by ``share`` of the batch."""
        now = self._now()
        part = now if self._before is None else torch._foreach_sub(now, self._before)
        self._squares.append(_square(part) / share**2)
        self._before = [gradient.clone() for gradient in now]

    @torch.no_grad()
    def observe_halves(self, first: Mapping[Tensor, Tensor]) -> None:
        """After the backward pass of a whole batch, to which its first half added ``first``."""
        now = self._now()
        half = [
            torch.zeros_like(p) if p.grad is None else first[p].detach() for p in self._parameters
        ]
        self._squares += [4 * _square(part) for part in (half, torch._foreach_sub(now, half))]

    def _now(self) -> list[Tensor]:
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._parameters
        ]

    @torch.no_grad()
    def observe_step(self, norm: Tensor, sizes: list[int]) -> None:
        """At the end of a step: ``norm`` of the whole gradient, image count of each part."""
        if comparable(sizes):
            small, large = sizes[0], sum(sizes)
            part, whole = torch.stack(self._squares).mean(), norm.square()
            square = (large * whole - small * part) / (large - small)
            trace = (part - whole) / (1 / small - 1 / large)
            torch.stack([trace, square], out=self._row)
        self.start_step()

    def keep(self, sizes: list[int]) -> None:
        """Keeps what the last ``observe_step`` read of parts of ``sizes``."""
        if comparable(sizes):
            self._records[self._kept % len(self._records)].copy_(self._row)
            self._kept += 1

    def end_epoch(self) -> dict[str, float]:
        """The noise columns of ``schema.EPOCHS``; NaN when no step had equal parts."""
        trace = square = np.nan
        if self._kept:
            records = self._records[: self._kept].cpu().double().numpy()  # MPS has no float64
            trace, square = records.mean(0).tolist()
        self._kept = 0
        return {
            "gradient_noise_trace": trace,
            "gradient_square": square,
            "gradient_noise_scale": trace / square if square > 0 else np.nan,
        }


def comparable(sizes: Sequence[int]) -> bool:
    """Whether parts of ``sizes`` images tell the noise: the formulas are for equal ones."""
    return len(sizes) > 1 and len(set(sizes)) == 1


def _square(gradient: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(gradient))).square().sum()
