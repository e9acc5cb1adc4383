"""What a container, or another control group, lets this process have of memory and CPUs (Linux).

Both versions of control groups are read, the process's own group and those above it. What is not
limited, or cannot be read, is ``None``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LISTING = Path("/proc/self/cgroup")


def memory_left() -> int | None:
    """Bytes up to the nearest limit. Page cache counts as free: the kernel gives it back first."""
    left = []
    for group in _groups("memory"):
        limits = [_number(group / name) for name in ("memory.max", "memory.high")]
        limits.append(_number(group / "memory.limit_in_bytes"))
        known = [limit for limit in limits if limit is not None]
        used = _number(group / "memory.current")
        if used is None:
            used = _number(group / "memory.usage_in_bytes")
        if known and used is not None:
            left.append(max(0, min(known) - max(0, used - _page_cache(group))))
    return min(left, default=None)


def cpus() -> float | None:
    """CPUs whose time the process gets, such as 1.5."""
    shares = []
    for group in _groups("cpu"):
        quota, period = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        words = _words(group / "cpu.max")
        if len(words) == 2 and all(word.isdigit() for word in words):
            quota, period = map(int, words)
        if quota is not None and period and quota > 0:
            shares.append(quota / period)
    return min(shares, default=None)


def _groups(controller: str) -> Iterator[Path]:
    for line in _lines(LISTING):
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        # Inside a container, its own group may be mounted as the root and listed by another path.
        top = ROOT / controller if names else ROOT
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _page_cache(group: Path) -> int:
    """Files in memory, those of a memory disk excepted, which cannot be given back."""
    stat = dict(line.split(None, 1) for line in _lines(group / "memory.stat") if " " in line)
    for prefix in ("total_", ""):  # version 1 has both, and the total is the group's
        if f"{prefix}inactive_file" in stat:
            return sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return 0


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path)[:1] for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # another system, another version, or hidden from this process
        return []
