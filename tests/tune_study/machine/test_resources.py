import math
import mmap
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from tune_study.machine import resources
from tune_study.machine.resources import COLUMNS, ResourceMonitor, Sample

CPU = torch.device("cpu")


def test_a_planted_allocation_and_a_busy_core_are_seen():
    with ResourceMonitor(CPU, interval_s=0.02) as monitor:
        before = monitor.read()
        block = mmap.mmap(-1, 64 * 2**20)  # torch might find room in memory freed before
        block.write(b"x" * (64 * 2**20))
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        during = monitor.read()
    assert set(during) == set(COLUMNS)
    assert during["rss_bytes"] - before["rss_bytes"] > 50 * 2**20
    assert during["cpu_cores_used"] > 0
    assert 0 < during["system_memory_used_bytes"] <= psutil.virtual_memory().total
    assert math.isnan(during["gpu_memory_bytes"])  # unknown is not 0
    block.close()


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "resources"]


def test_the_thread_ends_with_the_trial_even_when_it_fails():
    seen = []

    def trial():
        with ResourceMonitor(CPU, interval_s=0.01):
            seen.extend(watchers())
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        trial()
    assert len(seen) == 1
    assert not watchers()


def test_a_system_that_cannot_be_read_gives_nan_and_no_exception(monkeypatch):
    def deny(*_):
        raise psutil.AccessDenied

    with ResourceMonitor(CPU, interval_s=0.01) as monitor:
        monkeypatch.setattr(psutil, "virtual_memory", deny)
        assert all(math.isnan(value) for value in monitor.read().values())


def test_rss_peak_sees_an_allocation_and_can_start_anew():
    resources.reset_rss_peak()
    before = resources.rss_peak_bytes()
    with mmap.mmap(-1, 256 * 2**20) as block:  # new memory, where malloc may reuse freed pages
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        assert resources.rss_peak_bytes() - before > 50 * 2**20


def test_an_epochs_columns_are_the_most_that_was_seen_and_the_mean_of_the_cores(monkeypatch):
    monitor = ResourceMonitor(CPU)
    monitor._samples = [Sample(5.0, 60.0, 0.5, 1.0), Sample(9.0, 20.0, 0.0, 7.0)]
    last = Sample(6.0, 30.0, 1.0, 2.0)
    monkeypatch.setattr(monitor, "_look", lambda: monitor._samples.append(last))
    assert monitor.read() == Sample(9.0, 60.0, 0.5, 7.0)._asdict()
    assert monitor.read() == last._asdict()  # what was read is not read again


def test_a_sample_is_of_this_process(monkeypatch):
    process = SimpleNamespace(
        memory_info=lambda: SimpleNamespace(rss=3, vms=4), cpu_percent=lambda: 150.0
    )
    used = SimpleNamespace(used=5, available=6, total=7)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: used)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 9)
    for kind, held in (("cuda", 8.0), ("mps", 9.0)):
        monitor = ResourceMonitor(torch.device(kind))
        monitor._process = process
        assert monitor.read() == Sample(3.0, 5.0, 1.5, held)._asdict()
    assert monitor._interval_s == 1.0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert resources.is_out_of_memory(error) is expected


def test_memory_is_given_back_to_each_device_that_is_there(monkeypatch):
    calls, there = [], {"cuda": False, "mps": True}
    for name, module, backend in (
        ("cuda", torch.cuda, torch.cuda),
        ("mps", torch.mps, torch.backends.mps),
    ):
        monkeypatch.setattr(backend, "is_available", lambda name=name: there[name])
        monkeypatch.setattr(module, "empty_cache", lambda name=name: calls.append(name))
    monkeypatch.setattr(resources.gc, "collect", lambda: calls.append("collect"))
    libc = SimpleNamespace(malloc_trim=lambda pad: calls.append(f"trim {pad}"))
    monkeypatch.setattr(resources.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(resources.sys, "platform", "linux")
    resources.release_memory()
    there.update(cuda=True, mps=False)
    resources.release_memory()
    assert calls == ["collect", "mps", "trim 0", "collect", "cuda", "trim 0"]


def test_the_kernels_kills_are_summed_over_what_can_be_read(monkeypatch):
    texts = {
        "/sys/fs/cgroup/memory.events": "low 1\noom 5\noom_kill 2\noom_group_kill 9\n",
        "/proc/vmstat": "nr_free_pages 7\noom_kill 3\n",
    }

    def path(name):
        def read_text():
            if name not in texts:
                raise FileNotFoundError(name)
            return texts[name]

        return SimpleNamespace(read_text=read_text)

    monkeypatch.setattr(resources, "Path", path)
    assert resources.out_of_memory_kills() == 5
    del texts["/sys/fs/cgroup/memory.events"]
    assert resources.out_of_memory_kills() == 3
    texts.clear()
    assert resources.out_of_memory_kills() == 0


@pytest.mark.parametrize(
    ("platform", "expected"), [("linux", 5 * 1024), ("darwin", 7), ("freebsd", 7 * 1024)]
)
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, expected):
    status = SimpleNamespace(read_text=lambda: "VmPeak:\t9 kB\nVmHWM:\t   5 kB\nVmRSS:\t4 kB\n")
    monkeypatch.setattr(resources, "Path", lambda _: status)
    monkeypatch.setattr(resources.sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(resources.resource, "getrusage", lambda _: usage)
    assert resources.rss_peak_bytes() == expected
