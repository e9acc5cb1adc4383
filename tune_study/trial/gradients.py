"""GradientFlowMonitor: what the gradients do, read once per epoch and never inside a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WINDOW = 50
"""Steps behind a running median."""
MIN_HISTORY = 5
"""Steps before a median means anything."""
EXPLOSION_FACTOR = 10.0
VANISHING_RATIO = 1e-7
VANISHING_STEPS = 20
SPIKE_SIGMAS = 6.0
UNSEEN = -1.0
"""In the place of a norm: nothing was read since the last step."""
SPIKE_RISE = 1.0
"""Nats: a loss spike rises above the running median by more than this and by more than
``SPIKE_SIGMAS`` robust standard deviations (1.4826 x the median absolute deviation)."""


class GradientFlowMonitor:
    """Reads the gradients of the trainable parameters before clipping.

    ``observe`` only queues device work, and ``keep`` a copy of what it wrote: the norms of an
    epoch's ``steps`` lie in one buffer on the device, which ``end_epoch`` reads in one transfer.
    Every tensor here stays where it is. A *layer* is one trainable tensor, such as
    ``blocks.0.attn.qkv.lora_A``.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, warmup_steps: int, steps: int
    ) -> None:
        self.layers = list(parameters)
        self._parameters = list(parameters.values())
        self._warmup_steps = warmup_steps
        self._step = 0
        self._tiny_run = np.zeros(len(self.layers), dtype=np.int64)
        self._norm_tail: list[float] = []
        self._loss_tail: list[float] = []
        device, size = self._parameters[0].device, sum(p.numel() for p in self._parameters)
        self._row = torch.full((3 + 2 * len(self.layers),), UNSEEN, device=device)
        """The last step's norm, loss, cosine, norms of the layers and norms of their weights."""
        self._records = torch.zeros(steps, len(self._row), device=device)
        self._gradient, self._previous = (torch.zeros(size, device=device) for _ in range(2))
        self._previous_norm = torch.zeros((), device=device)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._kept = 0
        self._previous_norm.fill_(torch.nan)  # and with it the first step's cosine

    @torch.no_grad()
    def observe(self, loss: Tensor) -> Tensor:
        """Reads one optimizer step: after backward, before clipping.

        ``loss`` is the step's mean loss, a scalar on the device. Returns the global gradient norm,
        a scalar on the device, for the clipping to use. A parameter without a gradient counts as
        a zero gradient, whose layer then vanishes.
        """
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._parameters
        ]
        layer_norms = torch.stack(torch._foreach_norm(gradients))
        weight_norms = torch.stack(torch._foreach_norm([p.detach() for p in self._parameters]))
        norm = torch.linalg.vector_norm(layer_norms)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self._gradient)
        cosine = torch.dot(self._gradient, self._previous) / (norm * self._previous_norm)
        self._previous.copy_(self._gradient)
        self._previous_norm.copy_(norm)
        head = torch.stack([norm, loss.detach().float(), cosine])
        torch.cat([head, layer_norms, weight_norms], out=self._row)
        return norm

    def keep(self) -> None:
        """Keeps what the last ``observe`` read, as the epoch's next step."""
        self._records[self._kept % len(self._records)].copy_(self._row)
        self._row.fill_(UNSEEN)
        self._kept += 1

    def end_epoch(self) -> tuple[dict[str, float], list[float]]:
        """The epoch's gradient columns of ``schema.EPOCHS``, and the mean norm of every layer.

        Means, deviation, minimum and maximum are over the finite norms (NaN when there are none);
        the standard deviation is the population's. Raises ``RuntimeError`` when a step was not
        observed, because a monitor that is not connected must not report calm, and after more
        steps than the epoch has.
        """
        if self._kept > len(self._records):
            raise RuntimeError(
                f"GradientFlowMonitor saw {self._kept} steps in an epoch of {len(self._records)}"
            )
        records = self._records[: self._kept].cpu().double().numpy()  # MPS has no float64
        if not self._kept or (records[:, 0] == UNSEEN).any():
            raise RuntimeError("GradientFlowMonitor did not see every step: not connected")
        count = len(self.layers)
        norms, losses, cosines = records[:, 0], records[:, 1], records[:, 2]
        layer_norms, weight_norms = records[:, 3 : 3 + count], records[:, 3 + count :]
        explosions, self._norm_tail = count_explosions(norms, self._norm_tail)
        spikes, self._loss_tail = count_loss_spikes(losses, self._loss_tail)
        vanishing = self._count_vanishing(layer_norms, weight_norms)
        self._step += len(norms)
        self._start_epoch()
        columns = {
            **norm_statistics(norms),
            "grad_explosions": explosions,
            "grad_vanishing_layers": vanishing,
            "loss_spikes": spikes,
            "gradient_cosine_successive": _finite_mean(cosines),
        }
        return columns, [_finite_mean(layer) for layer in layer_norms.T]

    def _count_vanishing(self, layer_norms: np.ndarray, weight_norms: np.ndarray) -> int:
        """Layers that were tiny for ``VANISHING_STEPS`` steps in a row, in this epoch."""
        # |g| < ratio x |w|; false for B while it is 0, and for a NaN.
        tiny = layer_norms < VANISHING_RATIO * weight_norms
        vanished = np.zeros(len(self.layers), dtype=bool)
        for offset, row in enumerate(tiny):
            step = self._step + offset
            # At step 0 B is 0, so the gradient of A is exactly zero by construction.
            counts = step >= max(self._warmup_steps, 1)
            self._tiny_run = np.where(row & counts, self._tiny_run + 1, 0)
            vanished |= self._tiny_run >= VANISHING_STEPS
        return int(vanished.sum())

    def state_dict(self) -> dict[str, Any]:
        """Between epochs: what the next epoch's counts depend on."""
        return {
            "step": self._step,
            "tiny_run": self._tiny_run.tolist(),
            "norm_tail": self._norm_tail,
            "loss_tail": self._loss_tail,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        self._tiny_run = np.asarray(state["tiny_run"], dtype=np.int64)
        self._norm_tail = list(state["norm_tail"])
        self._loss_tail = list(state["loss_tail"])
        self._start_epoch()


def norm_statistics(norms: np.ndarray) -> dict[str, float]:
    """Mean, std, min, max and coefficient of variation of [steps] norms, and the stability score.

    ``stability_score = 1 / (1 + cv)``; a norm that is not finite makes it 0, since nothing is
    less stable.
    """
    finite = norms[np.isfinite(norms)]
    if finite.size == 0:
        names = ("mean", "std", "cv", "min", "max")
        return {f"grad_norm_{name}": np.nan for name in names} | {"stability_score": 0.0}
    mean, std = float(finite.mean()), float(finite.std())
    cv = std / mean if mean > 0 else np.nan
    return {
        "grad_norm_mean": mean,
        "grad_norm_std": std,
        "grad_norm_cv": cv,
        "grad_norm_min": float(finite.min()),
        "grad_norm_max": float(finite.max()),
        "stability_score": 1 / (1 + cv) if finite.size == norms.size else 0.0,
    }


def count_explosions(norms: np.ndarray, tail: list[float]) -> tuple[int, list[float]]:
    """Steps whose norm is not finite, or over 10 x the running median of the last 50 steps.

    ``norms`` [steps]; ``tail`` the finite norms before them. Returns the count and the new tail.
    """
    window, count = list(tail), 0
    for norm in norms.tolist():
        history = window[-WINDOW:]
        if not np.isfinite(norm):
            count += 1
            continue
        if len(history) >= MIN_HISTORY and norm > EXPLOSION_FACTOR * np.median(history):
            count += 1
        window.append(norm)
    return count, window[-WINDOW:]


def count_loss_spikes(losses: np.ndarray, tail: list[float]) -> tuple[int, list[float]]:
    """Steps whose loss is not finite, or far above the running median (see ``SPIKE_RISE``).

    Arguments and result as in ``count_explosions``.
    """
    window, count = list(tail), 0
    for loss in losses.tolist():
        history = np.asarray(window[-WINDOW:])
        if not np.isfinite(loss):
            count += 1
            continue
        if len(history) >= MIN_HISTORY:
            median = np.median(history)
            sigma = 1.4826 * np.median(np.abs(history - median))
            count += bool(loss - median > max(SPIKE_SIGMAS * sigma, SPIKE_RISE))
        window.append(loss)
    return count, window[-WINDOW:]


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else np.nan
