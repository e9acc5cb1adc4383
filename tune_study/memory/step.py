"""The bytes of one training step, by what holds them, and the peak that the allocator saw."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function

from tune_study.machine.device import kept_random_states
from tune_study.model.footprint import base_bytes, model_tensors
from tune_study.model.quantize import state_tensors, tensor_bytes

BACKWARD_MARK = "tune_study.backward"


class Ledger(NamedTuple):
    """The bytes of one training step by category; predicted and measured ones compare by field."""

    step_weights_bytes: int
    """Frozen base during a step, without quantization state: biases as bitsandbytes has cast them,
    and the original head, which PEFT keeps beside the trained copy."""
    quantization_state_bytes: int
    """Scales, codebooks and offsets of the quantized layers."""
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    """Allocated by the forward pass and still held when the backward pass begins."""

    @property
    def at_rest_bytes(self) -> int:
        """Held between two steps: all but gradients and activations."""
        return (
            self.step_weights_bytes
            + self.quantization_state_bytes
            + self.adapter_bytes
            + self.optimizer_bytes
        )


class StepMemory(NamedTuple):
    """One training step, measured. A byte count that the device cannot tell is ``None``."""

    step_weights_bytes: int
    quantization_state_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    saved_tensor_bytes: int
    """The part of the activations that autograd itself saves (see ``SavedTensors``)."""
    peak_train_bytes: int | None
    """Model and optimizer state at rest, plus the most that the step held beyond them."""
    peak_source: str

    @property
    def ledger(self) -> Ledger:
        return Ledger(*self[:6])


class SavedTensors:
    """Context: counts what autograd saves for backward, shared storage once, parameters never.

    ``nbytes``, known at the end, is at most the bytes held for backward: it misses what a function
    keeps outside of autograd's saved tensors. LLM.int8() does so with every input (64 of 320 MB for
    DeiT-tiny at batch 8), and gradient checkpointing with the inputs of the blocks.
    """

    nbytes = 0

    def __init__(self, at_rest: Iterable[Tensor]) -> None:
        self._at_rest = {tensor.untyped_storage()._cdata for tensor in at_rest}
        self._saved: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._at_rest and storage._cdata not in self._saved:
            self._saved[storage._cdata] = storage.nbytes()
            # Not held: what the forward pass drops again, as DoRA does, must not count as its peak.
            weakref.finalize(storage, self._saved.pop, storage._cdata, None)
        return tensor.detach()  # an operation's own output would keep that operation for good

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.nbytes = sum(self._saved.values())
        self._saved.clear()


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[int | None], Tensor],
    device: torch.device,
) -> StepMemory:
    """Runs training steps and measures the last.

    ``forward`` makes a batch and returns its loss; it is given how many images at most, or ``None``
    for the whole batch. A first step makes the optimizer's state and casts what bitsandbytes casts
    once. On the CPU one image does for that; on a GPU it takes two whole steps to warm the caches
    too. The steps leave no trace: trainable parameters, optimizer state and the global random state
    are put back. The batch that ``forward`` makes is part of the step; images at rest are not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with kept_random_states(device), _kept(parameters, optimizer):
        for images in [1] if device.type == "cpu" else [None, None]:
            forward(images).backward()
            gradient_bytes = tensor_bytes([p.grad for p in parameters if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ledger = _at_rest(model, parameters, optimizer, gradient_bytes)
        seen = SavedTensors(model_tensors(model))

        def watched() -> Tensor:
            with seen:
                return forward(None)

        activations, extra, source = _METERS[device.type](watched, optimizer)
    return StepMemory(
        *ledger[:5],
        activation_bytes=activations,
        saved_tensor_bytes=seen.nbytes,
        peak_train_bytes=None if extra is None else ledger.at_rest_bytes + extra,
        peak_source=source,
    )


@contextlib.contextmanager
def _kept(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Steps within leave neither parameters nor optimizer state changed."""
    saved = [parameter.detach().clone() for parameter in parameters]
    before = copy.deepcopy(optimizer.state_dict())  # the steps change the state itself
    yield
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](parameters), saved)
    optimizer.state.clear()
    optimizer.load_state_dict(before)


def _at_rest(
    model: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradient_bytes: int,
) -> Ledger:
    """The ledger between two steps, with the gradients of the one before."""
    state = tensor_bytes([t for module in model.modules() for t in state_tensors(module)])
    return Ledger(
        step_weights_bytes=base_bytes(model) - state - tensor_bytes(parameters),
        quantization_state_bytes=state,
        adapter_bytes=tensor_bytes(parameters),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=tensor_bytes(optimizer_tensors(optimizer)),
        activation_bytes=None,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The state tensors of ``optimizer``."""
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


Meter = tuple[int | None, int | None, str]
"""Activation bytes, peak bytes beyond the bytes at rest, and what measured them."""


def _step(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    loss = forward()
    with record_function(BACKWARD_MARK):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _cpu(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Meter:
    """From the allocator's own events under the profiler; they repeat to the byte."""
    # torch.profiler would make a tree of the events, which takes longer than the step.
    with profile(profile_memory=True) as profiler:
        _step(forward, optimizer)
    assert profiler.kineto_results is not None
    events = list(profiler.kineto_results.events())
    backward_ns = next(e.start_ns() for e in events if e.name() == BACKWARD_MARK)
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"),
        key=lambda change: change[0],
    )
    activations, peak = replay(changes, backward_ns)
    return activations, peak, "cpu allocator events of one profiled step"


def replay(changes: Iterable[tuple[int, int]], mark: int) -> tuple[int, int]:
    """(bytes held at time ``mark``, most bytes ever held) of ordered (time, change in bytes)."""
    held = peak = at_mark = 0
    for time, change in changes:
        if time <= mark:
            at_mark = held + change
        held += change
        peak = max(peak, held)
    return at_mark, peak


def _cuda(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Meter:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = forward()
    activations = torch.cuda.memory_allocated() - before
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() - before
    return activations, peak, "torch.cuda.max_memory_allocated"


def _mps(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Meter:
    """By torch's statistics. Where a torch keeps none for MPS, by what is held after the forward
    pass: that bounds the peak below, for int8 holds more for moments of the backward pass.
    """
    kept = _keeps_statistics()

    def allocated(which: str) -> int:
        torch.mps.synchronize()
        if kept:
            return int(torch.accelerator.memory_stats()[f"allocated_bytes.all.{which}"])
        return torch.mps.current_allocated_memory()

    before = allocated("current")
    loss = forward()
    activations = allocated("current") - before
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if kept:
        return activations, allocated("peak") - before, "torch.accelerator.memory_stats"
    return activations, activations, "torch.mps.current_allocated_memory after forward: lower bound"


def _keeps_statistics() -> bool:
    """Whether torch counts the bytes of this accelerator; their peak begins anew."""
    try:
        torch.accelerator.reset_peak_memory_stats()
        return "allocated_bytes.all.peak" in torch.accelerator.memory_stats()
    except RuntimeError:  # its allocator is of the kind without statistics
        return False


_METERS = {"cpu": _cpu, "cuda": _cuda, "mps": _mps}
