"""Where a number comes from: versions, commit, hardware, checksums."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tune_study.machine import limits

PACKAGES = ("torch", "torchvision", "timm", "peft", "bitsandbytes", "ray", "transformers", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python, this project and the packages that compute."""
    found = {"python": platform.python_version(), "tune-study": metadata.version("tune-study")}
    return found | {name: metadata.version(name) for name in PACKAGES}


@cache
def commit() -> str | None:
    """The commit of this checkout, ``-dirty`` when files differ; ``None`` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


@cache
def hardware() -> dict[str, Any]:
    """The machine in plain words: no host name, user or path."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        gpu = f"{_cpu_name()} GPU"  # on one chip
    return {
        "system": _system(),
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
    }


def what_computes(device: str) -> dict[str, Any]:
    """Of the machine that runs this: the versions, the commit, and whether ``device`` is there.

    The nodes of a cluster answer it before a study begins, on the CPU without loading torch.
    """
    there = device == "cpu"
    if not there:
        from tune_study.machine.device import available

        there = available(device)
    return {
        **versions(),
        "commit of tune-study": commit(),
        f"device {device}": "there" if there else "not there",
    }


def cores() -> int:
    """CPU cores that this process may use: by its affinity, and by the time it is given."""
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    else:
        there = os.cpu_count() or 1
    given = limits.cpus()
    return there if given is None else max(1, min(there, int(given)))


def _system() -> str:
    """``Linux x86_64``; on a Mac macOS' own version, by which its GPU library changes."""
    if release := platform.mac_ver()[0]:
        return f"macOS {release} {platform.machine()}"
    return f"{platform.system()} {platform.machine()}"


def _cpu_name() -> str:
    if platform.system() == "Darwin":  # "Apple M2"; platform.processor() knows only "arm"
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
