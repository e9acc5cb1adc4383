"""A planted NVML: how busy the card is that CUDA means. Its energy: test_energy.py."""

import sys
from types import SimpleNamespace

import pytest

from tests.tune_study.machine import test_energy
from tune_study.machine.nvml import NoReading, busy_share

nvml = test_energy.nvml


@pytest.fixture
def busy(nvml):
    """Per cent of each card, or what NVML says instead."""
    percent = {f"GPU-{test_energy.UUID}": 11, "GPU-other": 99}

    def rates(handle):
        if isinstance(percent[handle], str):
            raise nvml.module.NVMLError(percent[handle])
        return SimpleNamespace(gpu=percent[handle], memory=50)

    nvml.module.nvmlDeviceGetUtilizationRates = rates
    return percent


def test_the_share_is_of_the_card_that_cuda_means(busy):
    read = busy_share(test_energy.CUDA)
    assert read() == 0.11
    busy[f"GPU-{test_energy.UUID}"] = 100
    assert read() == 1.0


def test_a_card_that_does_not_tell_says_why(busy, nvml, monkeypatch):
    read = busy_share(test_energy.CUDA)
    busy[f"GPU-{test_energy.UUID}"] = "Not Supported"  # a part of a card (MIG)
    with pytest.raises(NoReading, match="NVML: Not Supported"):
        read()
    nvml.found.uuid = "a part of a card"
    with pytest.raises(NoReading, match="NVML: Not Found"):
        busy_share(test_energy.CUDA)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoReading, match="nvidia-ml-py, which reads a GPU's counter, is not"):
        busy_share(test_energy.CUDA)
