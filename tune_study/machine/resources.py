"""What a process takes from the machine: a thread that looks and never blocks, peaks, kills."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import re
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

INTERVAL_S = 1.0


class Sample(NamedTuple):
    """One look. Bytes; ``cpu_cores_used`` is CPU time of this process per time since the last."""

    rss_bytes: float
    system_memory_used_bytes: float
    cpu_cores_used: float
    gpu_memory_bytes: float
    """Held by this process's allocator; NaN without a GPU."""


COLUMNS = Sample._fields


class ResourceMonitor:
    """Context: samples this process once a second, for the rows of its trial.

    A sample costs about 0.1 ms and waits for nothing: no device is synchronised, and the thread
    ends with the process. What cannot be read is NaN. ``also`` is called beside every sample.
    """

    def __init__(
        self,
        device: torch.device,
        interval_s: float = INTERVAL_S,
        also: Callable[[], object] = lambda: None,
    ) -> None:
        self._device = device
        self._also = also
        self._interval_s = interval_s
        self._process = psutil.Process()
        self._samples: list[Sample] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="resources", daemon=True)

    def __enter__(self) -> ResourceMonitor:
        self._process.cpu_percent()  # the first call has no time before it
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=self._interval_s)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()
            self._also()

    def _look(self) -> None:
        with self._lock:
            try:
                self._samples.append(
                    Sample(
                        float(self._process.memory_info().rss),
                        float(psutil.virtual_memory().used),
                        self._process.cpu_percent() / 100,
                        _gpu_memory_bytes(self._device),
                    )
                )
            except psutil.Error:  # a system that does not let us look: the training goes on
                self._samples.append(Sample(*[math.nan] * len(COLUMNS)))

    def read(self) -> dict[str, float]:
        """The columns of ``schema.EPOCHS`` since the last call, which takes a sample of its own.

        Bytes are the most that was seen, ``cpu_cores_used`` the mean.
        """
        self._look()
        with self._lock:
            samples, self._samples = self._samples, []
        columns = {name: max(values) for name, *values in zip(COLUMNS, *samples, strict=True)}
        columns["cpu_cores_used"] = math.fsum(s.cpu_cores_used for s in samples) / len(samples)
        return columns


def _gpu_memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return float(torch.mps.current_allocated_memory())
    return math.nan


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's allocator refused, in the words each of them uses."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def release_memory() -> None:
    """Gives back what is no longer used: to the device, and with glibc to the system.

    glibc alone kept 4.3 GB after the measured steps of a ViT-S (docs/log.md).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def rss_peak_bytes() -> int:
    """Peak resident memory of this process since ``reset_rss_peak``, or ever off Linux."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_rss_peak() -> None:
    """Starts the peak anew, so that a worker's next trial does not inherit it (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # some containers forbid it: then it is "ever"
            Path("/proc/self/clear_refs").write_text("5")


def out_of_memory_kills() -> int:
    """Processes that the kernel has killed for lack of memory so far; 0 where it does not tell."""
    kills = 0
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue  # another system, or no cgroup v2
        kills += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return kills
