import math
import mmap
import threading
import time

import psutil
import pytest
import torch

from tune_study.machine import resources
from tune_study.machine.resources import COLUMNS, ResourceMonitor

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
