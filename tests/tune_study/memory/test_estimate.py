import pytest
import torch

from tune_study import estimate as estimates
from tune_study import train
from tune_study.config import UserError, parse_trial
from tune_study.data import load
from tune_study.estimate import (
    Estimate,
    bf16_slowness,
    estimate,
    free_bytes,
    refuse_any_that_cannot_fit,
    refuse_what_cannot_fit,
    settle_compute_dtype,
    without_bf16,
)
from tune_study.model import build_model
from tune_study.predict import expected_weights_bytes, predict
from tune_study.targets import skeleton_of

from .test_model import WHOLE_MODEL_BYTES

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]


@pytest.mark.parametrize(("name", "mode"), WHOLE_MODEL_BYTES)
def test_expected_bytes_are_the_designs(tiny, name, mode):
    config = tiny(mode, model=name, dataset="cifar10")
    assert (
        expected_weights_bytes(skeleton_of(name, 10, None), config)
        == (WHOLE_MODEL_BYTES[name, mode])
    )


@pytest.mark.parametrize("mode", MODES)
def test_expected_bytes_equal_the_built_model_to_the_byte(tiny, mode):
    config = tiny(
        mode, quantization={"mode": mode, "skip_layers": ["blocks.0.*"] if mode != "none" else []}
    )
    skeleton = skeleton_of(config.model, 10, None)
    assert expected_weights_bytes(skeleton, config) == build_model(config, 10).weights_bytes


@pytest.mark.parametrize("mode", [*MODES, "mixed"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_predicted_ledger_is_the_measured_one(tiny, mode, compute_dtype):
    """Weight-side categories to the byte; activations and peak within what docs/memory.md says."""
    overrides = {"blocks.0.*": "int8", "blocks.1.attn.*": "nf4-dq"} if mode == "mixed" else {}
    quantization = {"mode": "nf4" if mode == "mixed" else mode, "overrides": overrides}
    training = {"compute_dtype": compute_dtype, "per_device_train_batch_size": 5}
    config = tiny(mode, quantization=quantization, training=training)
    data = load("digits", None, config.data)
    random_state = torch.get_rng_state()
    expected = predict(config, 10, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random_state)
    training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
    measured = train.measure_memory(training)
    assert expected.ledger[:5] == measured.ledger[:5]
    assert expected.ledger.activation_bytes == pytest.approx(measured.activation_bytes, rel=1e-4)
    # A CPU without bf16 instructions widens the operands of a product in memory of its own.
    near = 0.03 if compute_dtype == "bf16" and without_bf16("cpu") else 3e-3
    assert expected.peak_train_bytes == pytest.approx(measured.peak_train_bytes, rel=near)


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_gradient_checkpointing_shrinks_the_activations_and_changes_no_bit(tiny, mode):
    runs = {}
    for checkpointing in (False, True):
        config = tiny(mode, training={"gradient_checkpointing": checkpointing})
        data = load("digits", None, config.data)
        training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
        measured = train.measure_memory(training)
        expected = predict(config, 10, torch.device("cpu"))
        assert expected.ledger[:5] == measured.ledger[:5]
        assert expected.peak_train_bytes == pytest.approx(measured.peak_train_bytes, rel=0.01)
        losses = [row["train_loss"] for row in train.fit(training)]
        runs[checkpointing] = measured, expected, losses
    # int8 keeps its inputs outside of autograd, where checkpointing cannot drop them.
    share = 0.4 if mode == "int8" else 0.1
    for plain, checkpointed in zip(runs[False][:2], runs[True][:2], strict=True):
        assert checkpointed.ledger.activation_bytes < share * plain.ledger.activation_bytes
        assert checkpointed.peak_train_bytes < 0.6 * plain.peak_train_bytes
    assert runs[True][2] == runs[False][2]


def test_estimate_carries_the_prediction(tiny):
    config = tiny("nf4")
    found = estimate(config, load("digits", None, config.data), torch.device("cpu"))
    expected = predict(config, 10, torch.device("cpu"))
    assert isinstance(found, Estimate)
    assert found[:2] == (expected.weights_bytes, expected.peak_train_bytes)
    assert found.train_time_s > 0


def test_a_trial_that_cannot_fit_is_refused_with_both_numbers(tiny, monkeypatch):
    config = tiny("nf4")
    peak = predict(config, 10, torch.device("cpu")).peak_train_bytes
    monkeypatch.setattr("tune_study.estimate.free_bytes", lambda device: peak)
    refuse_what_cannot_fit(config, 10, torch.device("cpu"))
    monkeypatch.setattr("tune_study.estimate.free_bytes", lambda device: peak - 1_000_000)
    with pytest.raises(UserError) as caught:
        refuse_what_cannot_fit(config, 10, torch.device("cpu"))
    for number in (peak, peak - 1_000_000):
        assert f"{number / 1e6:,.0f} MB" in str(caught.value)
    assert "per_device_train_batch_size" in str(caught.value)
    assert 10**8 < free_bytes(torch.device("cpu")) < 10**14


def test_a_plan_is_refused_as_its_trials_would_be_with_few_predictions(tiny, monkeypatch):
    cpu = torch.device("cpu")
    # The rank decides for none, the classes for nf4, whose largest is no trial of the plan.
    sizes = [("none", 4, 10), ("none", 8, 10), ("nf4", 8, 10), ("nf4", 4, 10_000)]
    planned = [(tiny(mode, lora={"r": r}), classes) for mode, r, classes in sizes]
    peaks = [predict(*trial, cpu).peak_train_bytes for trial in planned]
    asked = []
    monkeypatch.setattr(estimates, "predict", lambda *given: asked.append(given) or predict(*given))
    refuse_any_that_cannot_fit(planned, cpu)
    assert [(trial.quantization.mode, classes) for trial, classes, _ in asked] == [
        ("none", 10),
        ("none", 10_000),
    ]
    for free in (*peaks, max(peaks) + 1, min(peaks) - 1):
        monkeypatch.setattr(estimates, "free_bytes", lambda device, free=free: free)
        too_large = [t for (t, _), peak in zip(planned, peaks, strict=True) if peak > free]
        if not too_large:
            refuse_any_that_cannot_fit(planned, cpu)
            continue
        with pytest.raises(UserError, match=too_large[0].trial_id):
            refuse_any_that_cannot_fit(planned, cpu)


def test_a_mode_that_takes_more_than_full_precision_is_refused_where_that_fits(tiny, monkeypatch):
    settings = {"per_device_train_batch_size": 32, "gradient_checkpointing": True}
    none, int8 = (tiny(mode, training=settings) for mode in ("none", "int8"))
    cpu = torch.device("cpu")
    free = predict(none, 10, cpu).peak_train_bytes
    monkeypatch.setattr(estimates, "free_bytes", lambda device: free)
    refuse_what_cannot_fit(none, 10, cpu)
    with pytest.raises(UserError, match=int8.trial_id):
        refuse_any_that_cannot_fit([(none, 10), (int8, 10)], cpu)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("compute_dtype", "batch"), [("fp32", 1), ("fp32", 32), ("bf16", 32)])
def test_no_modes_step_takes_more_than_is_left_for_it(tiny, compute_dtype, batch, checkpointing):
    """What the plan's check relies on when it looks at full precision alone."""
    settings = {
        "compute_dtype": compute_dtype,
        "gradient_checkpointing": checkpointing,
        "per_device_train_batch_size": batch,
    }
    none, *others = (
        predict(tiny(mode, training=settings), 10, torch.device("cpu")).peak_train_bytes
        for mode in MODES[:4]
    )
    assert max(others) < estimates.ROOMY * none / 2


def dtypes(*trials, planned=()):
    settled, reason = settle_compute_dtype(trials, "cpu", planned)
    return [trial.training.compute_dtype for trial in settled], reason


def test_an_unnamed_compute_dtype_follows_the_device(monkeypatch):
    values = {"model": "m", "dataset": "digits"}
    unnamed = parse_trial({**values, "training": {"num_train_epochs": 3}})
    named = parse_trial({**values, "training": {"compute_dtype": "bf16"}})
    monkeypatch.setattr(estimates, "without_bf16", lambda device: "it has none")
    assert dtypes(unnamed, named) == (["fp32", "bf16"], "it has none")
    assert dtypes(named) == (["bf16"], None)
    monkeypatch.setattr(estimates, "without_bf16", lambda device: None)
    assert dtypes(unnamed, named) == (["bf16", "bf16"], None)


def test_a_planned_study_keeps_its_compute_dtype_on_another_machine(monkeypatch):
    unnamed = parse_trial({"model": "m", "dataset": "digits"})
    fp32 = parse_trial({"model": "m", "dataset": "digits", "training": {"compute_dtype": "fp32"}})
    monkeypatch.setattr(estimates, "without_bf16", lambda device: "it has none")
    assert dtypes(unnamed, planned={unnamed.trial_id})[0] == ["bf16"]
    monkeypatch.setattr(estimates, "without_bf16", lambda device: None)
    assert dtypes(unnamed, planned={fp32.trial_id})[0] == ["fp32"]


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
    monkeypatch.setattr(estimates.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(estimates, "bf16_slowness", lambda device: slowness)
    reason = without_bf16("cpu")
    assert reason is None if said is None else said in reason


def test_bf16_slowness_is_a_ratio_of_times_and_leaves_the_threads(monkeypatch):
    rates = {"fp32": 150e9, "bf16": 1.5e9}
    monkeypatch.setattr(estimates, "_matmul_rate", lambda size, dtype, device: rates[dtype])
    threads = torch.get_num_threads()
    assert bf16_slowness.__wrapped__("cpu") == pytest.approx(100)
    assert torch.get_num_threads() == threads
