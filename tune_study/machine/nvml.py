"""NVML, NVIDIA's library: what a GPU tells of itself and CUDA does not, or why it tells nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tune_study.errors import first_line


class NoReading(Exception):
    """Why there is none, as a clause."""


def energy_j(device: torch.device) -> Callable[[], float]:
    """Reads the joules that the card has taken since some moment: Volta and later.

    Raises ``NoReading``, as what it returns does.
    """
    nvml, handle = _card(device)
    return lambda: _told(nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def busy_share(device: torch.device) -> Callable[[], float]:
    """Reads the share (0..1) of the last second, or less, in which the card computed anything.

    Of all processes. Raises ``NoReading``, as what it returns does.
    """
    nvml, handle = _card(device)
    return lambda: _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100


def _card(device: torch.device) -> tuple[Any, Any]:
    """CUDA numbers the cards that it may see, NVML all: the UUID tells which."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise NoReading("nvidia-ml-py, which reads a GPU's counter, is not installed") from None
    with told_by("NVML", pynvml.NVMLError):
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _told(nvml: Any, ask: Callable[[], float]) -> float:
    with told_by("NVML", nvml.NVMLError):
        return float(ask())


@contextmanager
def told_by(who: str, error: type[Exception]) -> Iterator[None]:
    """Its ``error`` becomes a ``NoReading``."""
    try:
        yield
    except error as found:
        raise NoReading(f"{who}: {first_line(found)}") from found
