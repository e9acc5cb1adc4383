"""Each check passes on a sound machine, and fails when its fault is planted."""

import bitsandbytes as bnb
import pytest
import torch
from typer.testing import CliRunner

from tune_study import doctor, quantize, train
from tune_study.doctor import QUANTIZED, Verdict

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_kernels():
    yield
    quantize.check_kernel.cache_clear()


@pytest.mark.parametrize("mode", QUANTIZED)
def test_a_sound_layer_passes(mode):
    for check in (doctor.dequantization, doctor.train_eval_train, doctor.kernels):
        verdict = check(mode, CPU)
        assert verdict.ok, verdict
        assert verdict.found
        assert not verdict.remedy


def test_two_identical_runs_are_equal_and_the_peak_is_known():
    verdicts = list(doctor.training("nf4", CPU))
    assert [verdict.ok for verdict in verdicts] == [True, True]
    assert "equal to the last bit" in verdicts[0].found
    assert "cpu allocator events" in verdicts[1].found


@pytest.mark.skipif(
    not hasattr(bnb.functional, "has_avx512bf16") or not bnb.functional.has_avx512bf16(),
    reason="the fault shows on CPUs with AVX512-BF16 only",
)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_the_avx512bf16_fault_is_found_when_it_is_switched_back_on(mode, monkeypatch):
    sound = quantize.quantize_linear

    def faulty(*arguments):
        layer = sound(*arguments)
        layer.support_avx512bf16_for_cpu = True
        return layer

    monkeypatch.setattr(quantize, "quantize_linear", faulty)
    verdict = doctor.train_eval_train(mode, CPU)
    assert not verdict.ok
    assert "support_avx512bf16_for_cpu" in verdict.remedy


def test_a_kernel_that_returns_other_weights_is_found(monkeypatch):
    true = quantize.dequantize
    monkeypatch.setattr(quantize, "dequantize", lambda layer: true(layer).roll(1))
    quantize.check_kernel.cache_clear()
    assert not doctor.dequantization("int8", CPU).ok


def test_steps_that_differ_are_found(monkeypatch):
    true = train.train_step

    def noisy(training, images, labels):
        with torch.no_grad():
            training.parameters["head.bias"].add_(torch.rand(()) * 1e-6)
        return true(training, images, labels)

    monkeypatch.setattr(train, "train_step", noisy)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    first, _ = doctor.training("none", CPU)
    assert not first.ok
    assert first.remedy


def test_a_full_disk_is_found(monkeypatch, tmp_path):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(1, 1, 10)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert not doctor.disk(tmp_path).ok


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_and_the_remedy(ok, code, monkeypatch):
    verdict = Verdict("planted", ok, "what was seen", "" if ok else "what to do")
    monkeypatch.setattr(doctor, "examine", lambda device: iter([verdict]))
    app = doctor.typer.Typer()
    app.command()(doctor.main)
    result = CliRunner().invoke(app, ["--device", "cpu"])
    assert result.exit_code == code
    assert ("what to do" in result.output) is not ok


def test_a_device_that_is_not_there_is_refused():
    app = doctor.typer.Typer()
    app.command()(doctor.main)
    absent = next(d for d in ("cuda", "mps") if not doctor.available(d))
    assert CliRunner().invoke(app, ["--device", absent]).exit_code == 2
