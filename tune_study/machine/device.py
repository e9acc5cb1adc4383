"""A device: whether it is there, the settings under which trials repeat on it, random states."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tune_study.config import UserError

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
