import pytest
import torch

from tune_study.data.splits import load
from tune_study.errors import UserError
from tune_study.machine.device import free_bytes
from tune_study.memory import estimate as estimates
from tune_study.memory.estimate import (
    Estimate,
    estimate,
    refuse_any_that_cannot_fit,
    refuse_what_cannot_fit,
)
from tune_study.memory.predict import predict

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]


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
    monkeypatch.setattr("tune_study.memory.estimate.free_bytes", lambda device: peak)
    refuse_what_cannot_fit(config, 10, torch.device("cpu"))
    monkeypatch.setattr("tune_study.memory.estimate.free_bytes", lambda device: peak - 1_000_000)
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
