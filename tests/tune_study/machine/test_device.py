import platform

import pytest
import torch

from tune_study.errors import UserError
from tune_study.machine.device import bf16_slowness, choose_device, without_bf16


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
    for device in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"--device {device}"):
            choose_device(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
