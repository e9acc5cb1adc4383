"""An accelerator that is not there: its tensors lie on the CPU, and claim to lie elsewhere.

Within ``pretended`` the product takes every branch that it takes on a Mac or a GPU, and is refused
what those would refuse: tensors of two devices in one operation, a CPU generator's draws on the
device, and on MPS float64 and every operator that torch has no MPS kernel for. The device has a
generator of its own. What it cannot show is what the kernels themselves compute.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tune_study.machine import device as devices
from tune_study.memory import predict
from tune_study.model import quantize
from tune_study.trial import fidelity

STAND_INS = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "bmm",
}
"""The CPU's own operators that a Mac never sees, and what runs there instead."""
MIXING = ("copy_", "_to_copy", "_foreach_copy_", "index")
"""Operators that may take tensors of two devices (``index`` its indices)."""
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
GETTERS = {
    name: getattr(Tensor, name).__get__ for name in ("device", "is_cpu", "is_cuda", "is_mps")
}


@functools.cache
def _kernels() -> dict[str, dict[str, Any]]:
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    functions = yaml.load(path.read_text(), yaml.CSafeLoader)
    named = {function["func"].partition("(")[0]: function for function in functions}
    for function in functions:  # made by torch's build from the one that names them
        for name in filter(None, function.get("autogen", "").split(", ")):
            named.setdefault(name, function)
    return named


def has_mps_kernel(operator: str) -> bool:
    """Whether torch computes ``operator``, such as ``bmm`` or ``add.Tensor``, on MPS."""
    function = _kernels()[STAND_INS.get(operator, operator)]
    if delegate := function.get("structured_delegate"):
        return has_mps_kernel(delegate)
    dispatch = function.get("dispatch")
    if dispatch is None:  # made of other operators
        return True
    keys = [key.strip() for names in dispatch for key in names.split(",")]
    return any(key == "MPS" or key.startswith(COMPOSITE) for key in keys)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All in an operator's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


class _Place:
    """Which storages the pretended device holds, and the state of its generator."""

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind, 0)
        self.storages: set[StorageWeakRef] = set()
        self.generator = torch.Generator().manual_seed(0).get_state()
        self.making = False
        """A tensor is being made on the device: its draws are the device's."""

    def holds(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self.storages

    def take(self, tensor: Tensor) -> None:
        if self.device.type == "mps" and tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                "support float64. Please use float32 instead."
            )
        self.storages.add(StorageWeakRef(tensor.untyped_storage()))

    def release(self, tensor: Tensor) -> None:
        self.storages.discard(StorageWeakRef(tensor.untyped_storage()))

    def names(self, value: Any) -> bool:
        """Whether ``value`` is this device, in torch's words."""
        if isinstance(value, str):
            return value.partition(":")[0] == self.device.type
        return isinstance(value, torch.device) and value.type == self.device.type


class _Calls(TorchFunctionMode):
    """Python's calls: what names the device, asks for it, or moves a tensor."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, place = kwargs or {}, self.place
        if getattr(func, "__name__", "") == "__get__":
            name = next((name for name, getter in GETTERS.items() if func == getter), None)
            if name is None or not place.holds(args[0]):
                return func(*args)
            return place.device if name == "device" else name == f"is_{place.device.type}"
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and place.holds(args[0]):
            raise TypeError(f"can't convert {place.device} device type tensor to numpy")
        if func is Tensor.cpu:
            return self._moved(args[0], args[0], there=False)
        named = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.device | str)]
        claimed = any(place.names(value) for value in named)

        def real() -> Any:
            on_cpu = {k: "cpu" if place.names(v) else v for k, v in kwargs.items()}
            return func(*("cpu" if place.names(value) else value for value in args), **on_cpu)

        if func is Tensor.to:
            other = next((v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor)), None)
            there = claimed or (other is not None and place.holds(other))
            if not named and other is None:
                there = place.holds(args[0])  # a dtype alone
            return self._moved(args[0], real(), there=there)
        if not claimed or any(isinstance(value, Tensor) for value in args[:1]):
            return real()
        place.making = True
        try:
            out = real()
        finally:
            place.making = False
        for tensor in tensors_of(out):
            place.take(tensor)
        return out

    def _moved(self, before: Tensor, after: Tensor, *, there: bool) -> Tensor:
        """``after`` on the device or off it, in memory of its own where that is a move."""
        if self.place.holds(before) == there:
            return after
        if after.data_ptr() == before.data_ptr():
            after = after.clone()
        (self.place.take if there else self.place.release)(after)
        return after


class _Operators(TorchDispatchMode):
    """The operators behind the calls, those of the backward pass included."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, place = kwargs or {}, self.place
        with torch._C.DisableTorchFunction():  # a kernel sees where its numbers really lie
            tensors = [*tensors_of(args), *tensors_of(list(kwargs.values()))]
            here = [tensor for tensor in tensors if place.holds(tensor)]
            if here:
                self._check(func, tensors, here)
            if (here or place.making) and torch.Tag.nondeterministic_seeded in func.tags:
                out = self._drawn(func, args, kwargs)
            else:
                out = func(*args, **kwargs)
            if here:
                given = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
                for tensor in tensors_of(out):
                    if StorageWeakRef(tensor.untyped_storage()) not in given:
                        place.take(tensor)
            return out

    def _check(self, func: Any, tensors: list[Tensor], here: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if name not in MIXING and any(t.dim() and not self.place.holds(t) for t in tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.place.device} and cpu! ({func})"
            )
        if func.namespace != "aten":
            return
        self.seen.add(name)
        overload = func._overloadname
        full = name if overload == "default" else f"{name}.{overload}"
        if self.place.device.type == "mps" and not has_mps_kernel(full):
            raise NotImplementedError(f"The operator 'aten::{full}' is not implemented for MPS.")

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """With the device's generator in the place of the CPU's."""
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{self.place.device.type}' generator, found 'cpu'")
        host = torch.get_rng_state()
        torch.set_rng_state(self.place.generator)
        try:
            return func(*args, **kwargs)
        finally:
            self.place.generator = torch.get_rng_state()
            torch.set_rng_state(host)


ALLOCATED = 10**6
PEAK = 5 * 10**6
"""What the pretended allocator counts, in bytes."""


@contextmanager
def pretended(kind: str) -> Iterator[set[str]]:
    """``torch.device(kind)``, ``mps`` or ``cuda``, within; yields the operators that it was asked.

    Its memory is not counted: the statistics are ``ALLOCATED`` and ``PEAK``.
    """
    place = _Place(kind)
    operators = _Operators(place)
    with pytest.MonkeyPatch.context() as patch:
        _patch_module(patch, place)
        _patch_autocast(patch, kind)
        expected = predict._predict

        def on_the_cpu(key: str, classes: int, device: str) -> predict.Prediction:
            with _disable_current_modes():
                return expected(key, classes, "cpu")  # fake MPS tensors abort a Linux process

        patch.setattr(predict, "_predict", on_the_cpu)
        patch.setattr(devices, "OLDEST_TORCH_ON_MPS", (2, 0))
        patch.setattr(fidelity, "_latest", {})  # another pretended device's tensors are not ours
        quantize.check_kernel.cache_clear()
        calls = _Calls(place)
        _patch_backward(patch, calls)
        with operators, calls:
            yield operators.seen


def _patch_module(patch: pytest.MonkeyPatch, place: _Place) -> None:
    def seed(number: int) -> None:
        place.generator = torch.Generator().manual_seed(number).get_state()

    def set_state(state: Tensor, device: Any = None) -> None:
        place.generator = state.clone()

    module: Any = getattr(torch, place.device.type)
    functions: dict[str, Any] = {
        "get_rng_state": lambda device=None: place.generator.clone(),
        "set_rng_state": set_state,
        "synchronize": lambda device=None: None,
    }
    if place.device.type == "mps":
        functions |= {
            "manual_seed": seed,
            "current_allocated_memory": lambda: ALLOCATED,
            "driver_allocated_memory": lambda: ALLOCATED,
            "recommended_max_memory": lambda: 10**11,
            "set_per_process_memory_fraction": lambda fraction: None,
        }
        statistics = {"allocated_bytes.all.current": ALLOCATED, "allocated_bytes.all.peak": PEAK}
        patch.setattr(torch.accelerator, "memory_stats", lambda: statistics)
        patch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: None)
    else:
        functions |= {
            "manual_seed_all": seed,
            "memory_allocated": lambda device=None: ALLOCATED,
            "max_memory_allocated": lambda: PEAK,
            "reset_peak_memory_stats": lambda: None,
            "mem_get_info": lambda device: (10**11, 10**11),
        }
    for name, function in functions.items():
        patch.setattr(module, name, function)


def _patch_backward(patch: pytest.MonkeyPatch, calls: _Calls) -> None:
    """torch leaves the mode of the calls in a backward pass; what of it is Python enters it again.

    That is of our own functions and bitsandbytes', and the recomputation of checkpointed blocks.
    """

    def within(function: Any) -> Any:
        @functools.wraps(function)
        def called(*args: Any) -> Any:
            with calls:
                return function(*args)

        return called

    node, hooks = (
        torch.autograd.function.BackwardCFunction,
        torch.autograd.graph.saved_tensors_hooks,
    )
    patch.setattr(node, "apply", within(node.apply))
    prepare = hooks.__init__

    def prepared(self: Any, pack: Any, unpack: Any) -> None:
        prepare(self, within(pack), within(unpack))

    patch.setattr(hooks, "__init__", prepared)


def _patch_autocast(patch: pytest.MonkeyPatch, kind: str) -> None:
    """The device's autocast is the CPU's."""

    def real(device: str) -> str:
        return "cpu" if device == kind else device

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(real(device_type), *args, **kwargs)

    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch.amp, "autocast", Autocast)
    patch.setattr(torch, "is_autocast_enabled", lambda *device: enabled(*map(real, device)))
    patch.setattr(torch, "get_autocast_dtype", lambda device: dtype(real(device)))
