"""A device: whether it is there, what is free on it, its bf16, how trials repeat on it."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from tune_study.errors import UserError
from tune_study.machine import limits

TOO_SLOW = 4.0
"""A device that multiplies bf16 this many times slower than fp32 has no kernel for it."""
X86 = ("x86_64", "AMD64")

OLDEST_TORCH_ON_MPS = (2, 14)
"""Before it, matrix products over more than 32,768 values were wrong on M1 and M2, without an
error (pytorch issues 183535, 193487, 195163), and LoRA's gradients are such products."""
ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
"""torch's kernels for attention on CUDA, as ``torch.backends.cuda`` calls their switches."""


def available(device: str) -> bool:
    """Whether torch can use ``device``: cpu, mps or cuda."""
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or (device == "mps" and torch.backends.mps.is_available())


def refuse_wrong_products(device: str) -> None:
    """Raises ``UserError`` where the installed torch multiplies wrongly on ``device``."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if device == "mps" and version < OLDEST_TORCH_ON_MPS:
        raise UserError(
            f"--device mps: torch {torch.__version__} gets long matrix products wrong on Apple "
            "GPUs, without an error; pip install 'torch>=2.14', or choose --device cpu"
        )


def settle(device: torch.device, *, strict: bool = True) -> dict[str, Any]:
    """Sets this process up for trials on ``device`` that repeat to the bit; what it set, by name.

    On CUDA an operation without a deterministic kernel raises a ``RuntimeError``, which ``strict =
    False`` leaves out. cuDNN's attention, which torch prefers on an H100, is switched off: its
    backward pass is not deterministic. On MPS, memory ends where the system recommends it, and not
    at 1.7 times as much, where everything is swapped. Raises ``UserError`` as
    ``refuse_wrong_products``.
    """
    refuse_wrong_products(device.type)
    if device.type == "mps":
        torch.mps.set_per_process_memory_fraction(1.0)
        return {"memory_fraction": 1.0}
    if device.type != "cuda":
        return {}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    # Nothing reads such memory, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return {
        "deterministic": strict,
        "cublas_workspace_config": os.environ["CUBLAS_WORKSPACE_CONFIG"],
        "attention": [a for a in ATTENTION if getattr(torch.backends.cuda, f"{a}_sdp_enabled")()],
    }


def lacks_deterministic_kernel(error: Exception) -> bool:
    """Whether ``settle``'s strictness is what raised ``error``."""
    return isinstance(error, RuntimeError) and "use_deterministic_algorithms" in str(error)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of torch's global generators: the CPU's, and that of ``device``."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what ``random_states`` returned."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["device"])


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within leaves no trace."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)


def choose_device(device: str) -> str:
    """``auto`` is CUDA, else MPS, else the CPU.

    Raises ``UserError`` for one that is not there, or on which torch's products are wrong.
    """
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available(name))
    elif not available(device):
        raise UserError(f"--device {device}: this machine has none that torch can use; try auto")
    refuse_wrong_products(device)
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new process can allocate on ``device``; ``None`` where none can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        ours = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(ours, psutil.virtual_memory().available)  # all processes share the memory
    free = psutil.virtual_memory().available
    left = limits.memory_left()
    return free if left is None else min(free, left)


def without_bf16(device: str) -> str | None:
    """Why bf16 is slower than fp32 on ``device``, as a clause; ``None`` where it is not.

    An x86 CPU without AVX512-BF16 multiplies bf16 matrices about as fast as fp32 ones with AVX512,
    and a hundred times slower with AVX2; a training step takes 1.4 to 2.3 times as long with the
    former (benchmarks/README.md). Other devices are measured.
    """
    if device == "cpu" and platform.machine() in X86:
        if torch.cpu._is_avx512_bf16_supported():
            return None
        return "this CPU has no bf16 instructions (AVX512-BF16)"
    slowness = bf16_slowness(device)
    if slowness <= TOO_SLOW:
        return None
    return f"{device} multiplies bf16 matrices {slowness:.0f} times slower than fp32 ones"


@cache
def bf16_slowness(device: str) -> float:
    """Time of a bf16 matrix product over that of an fp32 one, measured.

    With one thread: on a busy machine several wait for each other, and both kinds look slow.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _matmul_rate(256, "fp32", device) / _matmul_rate(256, "bf16", device)
    finally:
        torch.set_num_threads(threads)


@cache
def matmul_rate(compute_dtype: str, device: str) -> float:
    """Floating-point operations per second of a matrix product, measured now.

    1024 x 1024 matrices; 256 x 256 where that is slow.
    """
    return _matmul_rate(
        1024 if _matmul_rate(256, compute_dtype, device) > 1e10 else 256, compute_dtype, device
    )


def _matmul_rate(size: int, compute_dtype: str, device: str) -> float:
    """Of the fastest product in 0.2 s: what else the machine does meanwhile shall not count."""
    dtype = torch.bfloat16 if compute_dtype == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    fastest, elapsed = math.inf, 0.0
    float((matrix @ matrix)[0, 0])
    while elapsed < 0.2:
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading it waits for the device
        took = time.perf_counter() - started
        fastest, elapsed = min(fastest, took), elapsed + took
    return 2 * size**3 / fastest
