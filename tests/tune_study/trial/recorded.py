"""A CUDA graph that is not there: what a step queues is recorded, operator by operator.

As a graph does, a replay runs no Python: every operator takes the tensors and the numbers that it
took when it was recorded, and leaves its results in the same places. Recording computes nothing
that lasts: what it changed is put back, the generator too. And what would break a capture is
refused: reading the device, results whose shape depends on numbers, tensors made from numbers of
the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tune_study.pretend import tensors_of
from tune_study.machine.device import random_states, set_random_states
from tune_study.trial.graph import Found, Work

REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal")
REFUSED += ("item", "argwhere")  # inference mode does not take them apart


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors from outside that were written to, by storage, with what they held."""
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        masks = name == "index" and any(t.dtype == torch.bool for t in tensors_of(args[1]))
        if name in REFUSED or masks:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = list(zip(func._schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of(value):
                    self._remember(tensor)
        out = func(*args, **kwargs)
        inside = {place(tensor) for _, value in given for tensor in tensors_of(value)}
        for tensor in tensors_of(out):
            if place(tensor) not in inside:
                self._made[place(tensor)] = tensor  # held, so that its place is not taken again
        self.calls.append((func, args, kwargs, out))
        return out

    def _remember(self, tensor: Tensor) -> None:
        if place(tensor) not in self._made and place(tensor) not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[place(tensor)] = whole, whole.clone()


def call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder:
    """``graph.Capturer`` for a device whose tensors lie on the CPU."""

    captures = replays = 0

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")

    def eager(self, work: Work) -> Found:
        return work()

    def capture(self, work: Work) -> tuple[Found, Callable[[], Any]]:
        self.captures += 1
        drawn = random_states(self._device)
        recording = _Recording()
        try:
            with recording:
                found = work()
        finally:
            for whole, held in recording.before.values():
                whole.copy_(held)
        set_random_states(drawn, self._device)  # but not where the capture fails
        for tensor in found:
            tensor.fill_(-1)  # nothing was computed

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, out in recording.calls:
                    draws = torch.Tag.nondeterministic_seeded in func.tags
                    made = draws and not any(True for _ in tensors_of([*args, *kwargs.values()]))
                    again = (self._drawn if made else call)(func, args, kwargs)
                    for old, new in zip(tensors_of(out), tensors_of(again), strict=True):
                        if place(old) != place(new):
                            old.copy_(new)

        return found, replay

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A new tensor of the device (pretend.py): nothing but its generator tells whose it is."""
        if self._device.type == "cpu":
            return func(*args, **kwargs)
        host, there = torch.get_rng_state(), random_states(self._device)["device"]
        torch.set_rng_state(there)
        out = func(*args, **kwargs)
        set_random_states({"device": torch.get_rng_state(), "torch": host}, self._device)
        return out
