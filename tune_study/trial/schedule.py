"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Schedule:
    """Warm-up along a line from 0, then half a cosine down to 0.

    To the last bit that of transformers' ``get_cosine_schedule_with_warmup``, in whose place it
    stands: torch's schedulers read a rate that lies on a device back from there at every step. Here
    it is computed on the host, in doubles, and only written to the optimizer.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, peak: float, warmup_steps: int, total_steps: int
    ) -> None:
        self._optimizer = optimizer
        self.peak, self.warmup_steps, self.total_steps = peak, warmup_steps, total_steps
        self.taken = 0
        """Optimizer steps before the next one."""
        self._write()

    @property
    def rate(self) -> float:
        """Of the next step."""
        if self.taken < self.warmup_steps:
            return self.peak * (self.taken / self.warmup_steps)
        after = self.taken - self.warmup_steps
        progress = after / max(1, self.total_steps - self.warmup_steps)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    def step(self) -> None:
        """After the optimizer's."""
        self.taken += 1
        self._write()

    def _write(self) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate)  # its place stays
            else:
                group["lr"] = self.rate

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """That of ``state_dict``, or of the ``LambdaLR`` that earlier versions used."""
        self.taken = int(state["last_epoch"])
        self._write()


def hold_rate(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keeps the learning rate where ``device`` wants it, whatever a checkpoint held.

    On CUDA in a tensor there, which a graph reads anew at every replay, and which eager steps read
    too, so that both compute the same; elsewhere as a number.
    """
    on_cuda = device.type == "cuda"
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if on_cuda else rate
        group["capturable"] = on_cuda
