import os

import pytest

from tune_study.machine import limits, provenance


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes control groups: ``groups(listing, {path: text})``."""

    def write(listing, files):
        (tmp_path / "listing").write_text(listing)
        for path, text in files.items():
            file = tmp_path / "root" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

    monkeypatch.setattr(limits, "ROOT", tmp_path / "root")
    monkeypatch.setattr(limits, "LISTING", tmp_path / "listing")
    return write


def test_page_cache_is_free_memory_and_a_memory_disk_is_not(groups):
    stat = "anon 500\nfile 2600\nshmem 600\ninactive_file 1500\nactive_file 500\n"
    groups("0::/\n", {"memory.max": 5000, "memory.current": 3100, "memory.stat": stat})
    assert limits.memory_left() == 5000 - (3100 - 2000)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "max", "memory.current": 3000}, None),
        ({"memory.max": 5000}, None),
        ({"memory.max": 5000, "memory.high": 4000, "memory.current": 1000}, 3000),
        ({"memory.max": 5000, "memory.current": 6000}, 0),
        ({}, None),
    ],
)
def test_the_nearest_limit_counts(groups, files, left):
    groups("0::/\n", files)
    assert limits.memory_left() == left


def test_groups_above_the_own_one_count_too(groups):
    files = {"a/memory.max": 9000, "a/memory.current": 8500, "a/b/memory.max": 3000}
    groups("0::/a/b\n", {**files, "a/b/memory.current": 1000, "a/cpu.max": "150000 100000"})
    assert limits.memory_left() == 500
    assert limits.cpus() == 1.5


def test_the_first_version_of_control_groups(groups):
    """In a container whose own group is mounted as the root and listed by the host's path."""
    groups(
        "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n",
        {
            "memory/memory.limit_in_bytes": 5000,
            "memory/memory.usage_in_bytes": 3000,
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700\ntotal_active_file 300",
            "cpu/cpu.cfs_quota_us": 200000,
            "cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert limits.memory_left() == 3000
    assert limits.cpus() == 2
    groups("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000})
    assert limits.cpus() is None


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)],
)
def test_the_time_that_a_container_gives_counts_as_cores(groups, text, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    groups("0::/\n", {"cpu.max": text})
    assert provenance.cores() == cores


def test_another_system_has_no_limits(groups):
    assert limits.memory_left() is None
    assert limits.cpus() is None
