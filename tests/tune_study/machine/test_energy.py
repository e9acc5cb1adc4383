"""Planted counters: one that grows, begins anew, goes back, fails; and who has none."""

import math
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tune_study.machine import energy
from tune_study.machine.energy import Counter, EnergyMeter, NoReading
from tune_study.machine.resources import ResourceMonitor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UUID = "12345678-90ab-cdef-1234-567890abcdef"


def metered(monkeypatch, *counters):
    monkeypatch.setattr(energy, "_counters", lambda device: ("planted", list(counters)))
    return EnergyMeter(CPU)


def readings(*values):
    """What a counter tells, one after the other; an exception is raised."""
    left = iter(values)

    def read():
        if isinstance(value := next(left), Exception):
            raise value
        return value

    return read


def test_counters_that_grow_and_begin_anew_are_added_up(monkeypatch):
    one, two = Counter(readings(50.0, 52.0, 3.0), range_j=60.0), Counter(readings(7.0, 7.0, 9.0))
    meter = metered(monkeypatch, one, two)
    assert (meter.joules(), meter.joules()) == (2.0, 2.0 + 11.0 + 2.0)
    assert (meter.source, meter.why_not) == ("planted", None)


@pytest.mark.parametrize("last", [NoReading("gone"), 4.0])
def test_what_was_missed_is_never_known_again(monkeypatch, last):
    meter = metered(monkeypatch, Counter(readings(5.0, 6.0, last, 7.0)))
    assert meter.joules() == 1.0
    assert math.isnan(meter.joules())
    assert math.isnan(meter.joules())
    assert meter.why_not == ("gone" if last != 4.0 else "the counter went back")
    assert meter.source == "planted"


def test_where_several_trials_share_the_device_nothing_is_read(monkeypatch):
    counted = [Counter(readings())]
    monkeypatch.setattr(energy, "_counters", lambda device: ("planted", counted))
    meter = EnergyMeter(CUDA, trials_on_device=2)
    assert math.isnan(meter.joules())
    assert (meter.source, meter.why_not) == ("", energy.SHARED)


def test_a_counter_is_read_beside_every_sample_of_the_monitor():
    seen = threading.Event()
    with ResourceMonitor(CPU, interval_s=0.01, also=seen.set):
        assert seen.wait(60)


@pytest.fixture
def nvml(monkeypatch):
    """pynvml of a machine whose second card CUDA calls its first; ``cards`` holds millijoules."""

    class NVMLError(Exception):
        pass

    cards = {f"GPU-{UUID}": 2_500_000, "GPU-other": 0}
    fake = ModuleType("pynvml")

    def handle_of(uuid):
        if uuid not in cards:
            raise NVMLError("Not Found")
        return uuid

    def total(handle):
        if isinstance(cards[handle], str):
            raise NVMLError(cards[handle])
        return cards[handle]

    fake.NVMLError, fake.nvmlInit = NVMLError, lambda: None
    fake.nvmlDeviceGetHandleByUUID, fake.nvmlDeviceGetTotalEnergyConsumption = handle_of, total
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    found = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return SimpleNamespace(cards=cards, module=fake, found=found)


def test_a_gpu_is_found_by_its_uuid_and_counts_millijoules(nvml):
    meter = EnergyMeter(CUDA)
    nvml.cards |= {f"GPU-{UUID}": 2_501_250, "GPU-other": 10**9}
    assert meter.joules() == 1.25
    assert meter.source == "NVML: all of the GPU"
    nvml.cards[f"GPU-{UUID}"] = "GPU is lost"
    assert math.isnan(meter.joules())
    assert meter.why_not == "NVML: GPU is lost"


def test_a_gpu_without_a_counter_says_why(nvml, monkeypatch):
    nvml.cards[f"GPU-{UUID}"] = "Not Supported"  # before Volta
    assert EnergyMeter(CUDA).why_not == "NVML: Not Supported"
    nvml.found.uuid = "a part of a card"
    assert EnergyMeter(CUDA).why_not == "NVML: Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = EnergyMeter(CUDA)
    assert found.why_not == "nvidia-ml-py, which reads a GPU's counter, is not installed"
    assert math.isnan(found.joules())


@pytest.fixture
def zones(tmp_path, monkeypatch):
    """Writes a zone of RAPL: ``zones(folder, name, microjoules)``."""

    def write(zone, name, energy_uj, range_uj=1_000_000):
        folder = tmp_path / zone
        folder.mkdir(exist_ok=True)
        for file, value in (
            ("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)
        ):  # fmt: skip
            (folder / file).write_text(f"{value}\n")

    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy.sys, "platform", "linux")
    return write


def test_packages_are_added_and_their_parts_are_not(zones):
    zones("intel-rapl", "the control type", 0)
    zones("intel-rapl-mmio:0", "package-0", 5)
    zones("intel-rapl:0", "package-0", 900_000)
    zones("intel-rapl:0:0", "core", 1)
    zones("intel-rapl:1", "package-1", 100_000)
    zones("intel-rapl:2", "psys", 7)
    meter = EnergyMeter(CPU)
    for zone, name, value in (
        ("intel-rapl:0", "package-0", 150_000),
        ("intel-rapl:0:0", "core", 900_000),
        ("intel-rapl:1", "package-1", 300_000),
        ("intel-rapl:2", "psys", 900_000),
    ):
        zones(zone, name, value)
    assert meter.joules() == pytest.approx(0.25 + 0.2)
    assert meter.source == "RAPL: package-0, package-1 of the whole machine"


def test_a_cpu_without_a_counter_that_one_may_read_says_why(zones, tmp_path, monkeypatch):
    assert EnergyMeter(CPU).why_not == f"no counter of the CPU's energy is in {tmp_path}"
    zones("intel-rapl:0", "package-0", "nonsense")
    path = tmp_path / "intel-rapl:0" / "energy_uj"
    assert (EnergyMeter(CPU).why_not or "").startswith(f"{path}: invalid literal for int()")
    read_text = energy.Path.read_text

    def refused(self, *given):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return read_text(self, *given)

    monkeypatch.setattr(energy.Path, "read_text", refused)
    assert EnergyMeter(CPU).why_not == f"{path} is readable by root alone"
    path.unlink()
    monkeypatch.setattr(energy.Path, "read_text", read_text)
    assert EnergyMeter(CPU).why_not == f"{path}: No such file or directory"


@pytest.fixture
def mac(monkeypatch):
    """A Mac with zeus_apple_silicon; ``parts`` are millijoules, ``None`` what the chip has not."""
    parts = dict.fromkeys(energy.CHIP, 1000) | {"ane_mj": None}
    fake = ModuleType("zeus_apple_silicon")

    def cumulative():
        if parts["gpu_mj"] == "fails":
            raise RuntimeError("planted")
        return SimpleNamespace(**parts, performance_cores_mj=[10**6])

    fake.AppleEnergyMonitor = lambda: SimpleNamespace(get_cumulative_energy=cumulative)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", fake)
    monkeypatch.setattr(energy.sys, "platform", "darwin")
    monkeypatch.setattr(energy.platform, "machine", lambda: "arm64")
    return parts


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_a_macs_chip_is_the_sum_of_its_parts(mac, device):
    meter = EnergyMeter(torch.device(device))
    mac |= {"cpu_total_mj": 1500, "gpu_mj": 3000, "dram_mj": 1250}
    assert meter.joules() == pytest.approx(0.5 + 2 + 0.25)
    assert meter.source == "IOReport: cpu_total, gpu, gpu_sram, dram of the whole machine"
    mac["gpu_mj"] = "fails"
    assert math.isnan(meter.joules())
    assert meter.why_not == "IOReport: planted"


def test_a_mac_without_a_reading_says_why(mac, monkeypatch):
    mac["gpu_mj"] = None
    assert "does not tell the energy" in (EnergyMeter(CPU).why_not or "")
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", None)
    assert "pip install 'tune-study[energy]'" in (EnergyMeter(CPU).why_not or "")
    monkeypatch.setattr(energy.platform, "machine", lambda: "x86_64")
    for device in ("cpu", "mps"):
        found = EnergyMeter(torch.device(device))
        assert found.why_not == "no counter of this device's energy is known"
