import platform
from types import SimpleNamespace

import pytest
import torch

from tune_study.errors import UserError
from tune_study.machine import device
from tune_study.machine.device import (
    bf16_slowness,
    choose_device,
    free_bytes,
    without_bf16,
)


@pytest.mark.parametrize(
    ("machine", "instructions", "slowness", "said"),
    [
        ("x86_64", True, 100.0, None),
        ("x86_64", False, 1.0, "AVX512-BF16"),
        ("arm64", False, 1.5, None),
        ("arm64", False, 100.0, "cpu multiplies bf16 matrices 100 times slower than fp32 ones"),
    ],
)
def test_x86_is_asked_for_its_instructions_and_others_are_measured(
    monkeypatch, machine, instructions, slowness, said
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr("tune_study.machine.device.bf16_slowness", lambda device: slowness)
    reason = without_bf16("cpu")
    assert reason is None if said is None else said in reason


def test_bf16_slowness_is_a_ratio_of_times_and_leaves_the_threads(monkeypatch):
    rates = {"fp32": 150e9, "bf16": 1.5e9}
    monkeypatch.setattr(
        "tune_study.machine.device._matmul_rate", lambda size, dtype, device: rates[dtype]
    )
    threads = torch.get_num_threads()
    assert bf16_slowness.__wrapped__("cpu") == pytest.approx(100)
    assert torch.get_num_threads() == threads


def test_the_device_is_honoured_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    for name in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("5000", "3000", 2000), ("max", "3000", 9000), ("90000", "10", 9000), (None, None, 9000)],
)
def test_free_memory_is_what_the_container_leaves(limit, used, free, tmp_path, monkeypatch):
    for name, text in (("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(device, "Path", lambda _: tmp_path)
    left = SimpleNamespace(available=9000)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: left)
    assert free_bytes(torch.device("cpu")) == free
