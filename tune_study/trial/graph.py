"""The training step as a CUDA graph: captured once, then replayed for every full batch. So is the
forward pass of evaluations.

Nine tenths of a small batch's step on a GPU is Python launching kernels; a replay launches them all
at once. What is captured is the step that other devices take, too: it only queues work, and reads
and writes tensors that stay where they are. This module has not run on a GPU yet:
``python -m benchmarks.accelerator --gate`` is what it has to pass there, and until it has,
``training.step=auto`` is eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line
from tune_study.machine.device import random_states, set_random_states

WARM_UP = 3
"""Real steps before the capture. They make what is made once: the optimizer's state, cuBLAS's
workspace, bitsandbytes' casts; and where memory is not enough, it ends here, as without a graph."""
GATE = "python -m benchmarks.accelerator --gate"

Found = tuple[Tensor, Tensor]
"""(mean loss, count of hits), on the device."""
Work = Callable[[], Found]


def step_of(config: TrialConfig) -> str:
    """``eager`` or ``graph``: what the configuration's ``training.step`` means now."""
    return "graph" if config.training.step == "graph" else "eager"


def why_eager(config: TrialConfig, device: str) -> str | None:
    """Why ``auto`` takes no graph, as a sentence; ``None`` where there is nothing to say."""
    if device != "cuda" or config.training.step != "auto":
        return None
    return (
        "training.step = auto: steps are eager, because the CUDA graph has not passed its gate on "
        f"a GPU yet ({GATE}); training.step=graph takes it"
    )


def refuse_graph(config: TrialConfig, device: str) -> None:
    """Raises ``UserError`` where ``training.step = graph`` can't be had."""
    if config.training.step != "graph":
        return
    reason = None
    if device != "cuda":
        reason = f"--device {device} has no CUDA graphs"
    elif config.data.transform is not None:
        reason = f"data.augment={config.data.augment} is code of yours, which no graph can hold"
    elif config.training.gradient_checkpointing:
        reason = "blocks that are computed twice turn the generator back, which no graph can"
    if reason is not None:
        raise UserError(f"training.step = graph: {reason}; set training.step=eager")


class Capturer(Protocol):
    """A device that can keep what is queued on it."""

    def eager(self, work: Work) -> Found:
        """Queues ``work`` where it would be captured."""

    def capture(self, work: Work) -> tuple[Found, Callable[[], Any]]:
        """(where ``work`` leaves what it finds, what queues it again). Computes nothing."""


class Cuda:
    """A CUDA device. Warm-up and capture share a stream, as torch asks for."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def eager(self, work: Work) -> Found:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = work()
        here.wait_stream(self._stream)
        return found

    def capture(self, work: Work) -> tuple[Found, Callable[[], Any]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads read images into pinned memory, and look at the device's load.
        mode = "thread_local"
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode):
            found = work()
        return found, graph.replay


class GraphedStep:
    """Steps on full batches: ``WARM_UP`` eager ones, then replays of one graph.

    ``step`` takes (part of the plan, images or ``None``), as ``batches.planned`` yields them, or
    (labels, images) of an evaluation, and only queues work. It is always given the same two
    tensors, into which each batch is copied.
    ``undo`` puts away what a capture that failed has left in Python's objects.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor | None], Found],
        undo: Callable[[], None],
        part: Tensor,
        images: Tensor | None,
        device: Capturer,
    ) -> None:
        self._step, self._undo, self._device = step, undo, device
        self._part, self._images = part, images
        self._warm = 0
        self._found: Found | None = None
        self._replay: Callable[[], Any] | None = None
        self.failure: str | None = None
        """Why the capture failed; the steps after it are eager."""

    def __call__(self, part: Tensor, images: Tensor | None) -> Found:
        """Queues the step on one full batch."""
        self._part.copy_(part)
        if self._images is not None:
            assert images is not None
            self._images.copy_(images, non_blocking=True)
        if self._warm == WARM_UP and self._replay is None and self.failure is None:
            self._capture()
        if self._replay is not None and self._found is not None:
            self._replay()
            return self._found
        found = self._device.eager(self._work)
        self._warm += 1
        return found

    @property
    def captured(self) -> bool:
        """Whether full batches are replayed from now on."""
        return self._replay is not None

    def _work(self) -> Found:
        return self._step(self._part, self._images)

    def _capture(self) -> None:
        before = random_states(self._part.device)
        try:
            self._found, self._replay = self._device.capture(self._work)
        except RuntimeError as error:  # out of memory, too: eager steps had enough
            self.failure = first_line(error)
            set_random_states(before, self._part.device)
            self._undo()
