"""The energy that a device has taken, by its own counter; or why there is no reading."""

from __future__ import annotations

import math
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tune_study.machine import nvml
from tune_study.machine.nvml import NoReading, told_by

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the counters of CPUs (RAPL), Intel's and AMD's."""
SHARED = "several trials run on the device at a time, and its counter is of all of them"
CHIP = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "ane_mj", "dram_mj")
"""Of what ``zeus_apple_silicon`` tells, the parts that do not hold each other."""


class Counter(NamedTuple):
    """One counter of a device."""

    read: Callable[[], float]
    """Joules since some moment. Raises ``NoReading``."""
    range_j: float = math.inf
    """Where it begins anew."""


class EnergyMeter:
    """Joules that a device takes from now on, whatever it takes them for.

    A CPU's counter begins anew after minutes, and must be read before it does so twice: the
    ``ResourceMonitor`` reads once a second, from its thread.
    """

    def __init__(self, device: torch.device, trials_on_device: int = 1) -> None:
        self.source = ""
        """What counts, in words."""
        self.why_not: str | None = None
        """Why nothing does, or no longer."""
        self._joules = 0.0
        self._lock = threading.Lock()
        try:
            if trials_on_device > 1:
                raise NoReading(SHARED)
            self.source, self._counters = _counters(device)
            self._last = [counter.read() for counter in self._counters]
        except NoReading as why:
            self.why_not = str(why)

    def joules(self) -> float:
        """Since the beginning. NaN from the first failure on: what was missed is not known."""
        with self._lock:
            if self.why_not is None:
                try:
                    self._joules += self._since_last()
                except NoReading as why:
                    self.why_not = str(why)
            return self._joules if self.why_not is None else math.nan

    def _since_last(self) -> float:
        before, self._last = self._last, [counter.read() for counter in self._counters]
        taken = 0.0
        for counter, first, last in zip(self._counters, before, self._last, strict=True):
            taken += last - first if last >= first else last - first + counter.range_j
        if not math.isfinite(taken):
            raise NoReading("the counter went back")
        return taken


def _counters(device: torch.device) -> tuple[str, list[Counter]]:
    """What counts the energy of ``device``, in words, and its counters. Raises ``NoReading``."""
    if device.type == "cuda":
        return "NVML: all of the GPU", [Counter(nvml.energy_j(device))]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return _chip()
    if device.type == "cpu" and sys.platform == "linux":
        return _packages()
    raise NoReading("no counter of this device's energy is known")


def _chip() -> tuple[str, list[Counter]]:
    """Apple silicon, by IOReport: it asks for no root, but Apple does not document it."""
    try:
        import zeus_apple_silicon
    except ModuleNotFoundError:
        raise NoReading("on a Mac, pip install 'tune-study[energy]' reads the counter") from None
    with told_by("IOReport", RuntimeError):
        monitor = zeus_apple_silicon.AppleEnergyMonitor()
        first = monitor.get_cumulative_energy()
    parts = [part for part in CHIP if getattr(first, part) is not None]
    if not {"cpu_total_mj", "gpu_mj"} <= set(parts):
        raise NoReading("IOReport: it does not tell the energy of this chip's CPU and GPU")

    def read() -> float:
        with told_by("IOReport", RuntimeError):
            now = monitor.get_cumulative_energy()
        return sum(float(getattr(now, part)) for part in parts) / 1e3

    named = ", ".join(part.removesuffix("_mj") for part in parts)
    return f"IOReport: {named} of the whole machine", [Counter(read)]


def _packages() -> tuple[str, list[Counter]]:
    """Every CPU package: its zones' parts, and what counts the whole platform, are left out."""
    names, counters = [], []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        if (name := _word(zone / "name")).startswith("package"):
            names.append(name)
            range_j = _microjoules(zone / "max_energy_range_uj")
            counters.append(Counter(_reader(zone / "energy_uj"), range_j))
    if not counters:
        raise NoReading(f"no counter of the CPU's energy is in {POWERCAP}")
    return f"RAPL: {', '.join(names)} of the whole machine", counters


def _reader(path: Path) -> Callable[[], float]:
    return lambda: _microjoules(path)


def _microjoules(path: Path) -> float:
    """In joules."""
    with told_by(str(path), ValueError):
        return int(_word(path)) / 1e6


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError:  # since 2020: a CPU's energy gives secrets away
        raise NoReading(f"{path} is readable by root alone") from None
    except OSError as error:
        raise NoReading(f"{path}: {error.strerror}") from None
