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
    monkeypatch.setattr(device, "OLDEST_TORCH_ON_MPS", (2, 0))
    assert choose_device("auto") == "cpu"
    for name in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"


@pytest.mark.parametrize(("limit", "free"), [(2000, 2000), (None, 9000), (90000, 9000)])
def test_free_memory_is_what_the_container_leaves(limit, free, monkeypatch):
    monkeypatch.setattr(device.limits, "memory_left", lambda: limit)
    left = SimpleNamespace(available=9000)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: left)
    assert free_bytes(torch.device("cpu")) == free


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("mps", "2.13.1", True),
        ("mps", "2.14.0", False),
        ("mps", "3.0.0", False),
        ("mps", "2.9.0", True),
        ("cpu", "2.13.1", False),
    ],
)
def test_torch_before_2_14_is_refused_on_mps_alone(monkeypatch, name, version, refused):
    monkeypatch.setattr(torch, "__version__", version)
    if refused:
        with pytest.raises(UserError, match=f"torch {version} gets long matrix products wrong"):
            device.refuse_wrong_products(name)
    else:
        device.refuse_wrong_products(name)


def test_a_cpu_needs_no_setting_and_only_torchs_own_words_are_its_strictness():
    assert device.settle(torch.device("cpu")) == {}
    said = "... 'torch.use_deterministic_algorithms(True)' ..."
    assert device.lacks_deterministic_kernel(RuntimeError(said))
    assert not device.lacks_deterministic_kernel(RuntimeError("another"))
    assert not device.lacks_deterministic_kernel(ValueError(said))


def test_random_draws_leave_no_trace_even_when_they_fail():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    def draw():
        with device.kept_random_states(torch.device("cpu")):
            torch.rand(5)
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        draw()
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("ours", "left"), [(700, 9000), (20_000, 9000)])
def test_free_memory_of_mps_is_the_least_of_what_is_allowed_and_there(monkeypatch, ours, left):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: ours + 50)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 50)
    monkeypatch.setattr(
        device.psutil, "virtual_memory", lambda: SimpleNamespace(available=left, total=10**6)
    )
    assert free_bytes(torch.device("mps")) == min(ours, left)


def test_four_times_slower_is_not_yet_without_a_kernel(monkeypatch):
    monkeypatch.setattr(device, "bf16_slowness", lambda name: 4.0)
    assert without_bf16("cuda") is None
    monkeypatch.setattr(device, "bf16_slowness", lambda name: 4.5)
    assert without_bf16("cuda") is not None


@pytest.mark.parametrize(("rate", "sizes"), [(1e10, [256, 256]), (1.1e10, [256, 1024])])
def test_a_slow_device_is_measured_with_small_matrices(monkeypatch, rate, sizes):
    asked = []

    def measured(size, compute_dtype, name):
        asked.append(size)
        assert (compute_dtype, name) == ("bf16", "cpu")
        return rate

    monkeypatch.setattr(device, "_matmul_rate", measured)
    assert device.matmul_rate.__wrapped__("bf16", "cpu") == rate
    assert asked == sizes


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    # Three products, of 0.125, 0.0625 and 0.25 s: the last passes 0.2 s in all.
    times = iter([1.0, 1.125, 2.0, 2.0625, 3.0, 3.25])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(times))
    assert device._matmul_rate(4, "fp32", "cpu") == 2 * 4**3 / 0.0625
    assert next(times, None) is None


def test_bf16_is_measured_with_one_thread(monkeypatch):
    asked, threads = [], torch.get_num_threads()
    monkeypatch.setattr(
        device,
        "_matmul_rate",
        lambda *given: asked.append((*given, torch.get_num_threads())) or 1.0,
    )
    torch.set_num_threads(2)
    try:
        bf16_slowness.__wrapped__("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert asked == [(256, "fp32", "cpu", 1), (256, "bf16", "cpu", 1)]
