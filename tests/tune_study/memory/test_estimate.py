import math
from types import SimpleNamespace

import pytest
import torch

from tune_study.data.place import Place
from tune_study.data.splits import outline
from tune_study.errors import UserError
from tune_study.machine.device import free_bytes
from tune_study.machine.gpus import Need
from tune_study.memory import estimate as estimates
from tune_study.memory.estimate import (
    Estimate,
    estimate,
    largest_of,
    need_of,
    refuse_any_that_cannot_fit,
    refuse_what_cannot_fit,
)
from tune_study.memory.predict import predict

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]


def test_estimate_carries_the_prediction(tiny):
    config = tiny("nf4")
    found = estimate(config, outline("digits", Place(), config.data), torch.device("cpu"))
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


def test_the_need_is_that_of_the_largest_trial_with_its_full_precision_twin(tiny):
    device = torch.device("cpu")  # another would have to be there
    none, small, nf4 = (tiny(m, lora={"r": r}) for m, r in (("none", 4), ("nf4", 2), ("nf4", 8)))
    data = outline("digits", Place(), none.data)
    image_bytes = 80 * 3 * 32**2
    alone = need_of([(none, data)], device)
    peak = predict(none, 10, device).peak_train_bytes
    assert alone == Need(int(1.2 * peak) + 2**30, image_bytes)
    ours = predict(nf4, 10, device).ledger.at_rest_bytes
    twin = predict(tiny("none", lora={"r": 8}), 10, device).peak_train_bytes
    both = Need(int(1.2 * (ours + twin)) + 2**30, image_bytes)
    for planned in ([nf4], [none, small, nf4], [nf4, none]):
        assert need_of([(trial, data) for trial in planned], device) == both
        assert need_of([(trial, data) for trial in planned], device, 5).step_bytes == (
            both.step_bytes - 2**30 + 5
        )
        assert largest_of([(trial, data) for trial in planned], device) == nf4
    of_a_folder = tiny("none", dataset="folder:d", data={"image_size": 48})
    assert need_of([(of_a_folder, data)], device).image_bytes == 80 * 3 * 48**2


def test_a_step_that_cannot_be_predicted_needs_what_there_is(tiny, monkeypatch):
    unknown = predict(tiny("none"), 10, torch.device("cpu"))._replace(peak_train_bytes=None)
    monkeypatch.setattr(estimates, "predict", lambda *given: unknown)
    data = outline("digits", Place(), tiny("none").data)
    assert need_of([(tiny("none"), data)], torch.device("cpu")) == Need(None, 0)
    assert largest_of([(tiny("none"), data)], torch.device("cpu")) == tiny("none")


def test_a_mode_that_takes_more_than_full_precision_is_refused_where_that_fits(tiny, monkeypatch):
    settings = {"per_device_train_batch_size": 32, "gradient_checkpointing": True}
    none, int8 = (tiny(mode, training=settings) for mode in ("none", "int8"))
    cpu = torch.device("cpu")
    free = predict(none, 10, cpu).peak_train_bytes
    monkeypatch.setattr(estimates, "free_bytes", lambda device: free)
    refuse_what_cannot_fit(none, 10, cpu)
    with pytest.raises(UserError, match=int8.trial_id):
        refuse_any_that_cannot_fit([(none, 10), (int8, 10)], cpu)
    need = need_of([(int8, outline("digits", Place(), int8.data))], cpu, process_bytes=0)
    assert need.step_bytes == int(1.2 * predict(int8, 10, cpu).peak_train_bytes)


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


class Skeleton(torch.nn.Module):
    """Two layers, 11 tokens of width 6, two blocks: all that an estimate looks at."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(5)
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 11, 6))
        self.blocks, self.num_features = [self.norm, self.norm], 6


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("peak", [None, 77])
def test_seconds_are_work_over_the_measured_rate(tiny, monkeypatch, checkpointing, passes, peak):
    asked = []
    monkeypatch.setattr(estimates, "matmul_rate", lambda *given: asked.append(given) or 1e6)
    monkeypatch.setattr(estimates, "skeleton_of", lambda *_: Skeleton())
    expected = SimpleNamespace(weights_bytes=8, peak_train_bytes=peak)
    monkeypatch.setattr(estimates, "predict", lambda *_: expected)
    settings = {"gradient_checkpointing": checkpointing, "num_train_epochs": 3}
    config = tiny("nf4", training={**settings, "compute_dtype": "fp32"})
    data = outline("digits", Place(), config.data)
    found = estimate(config, data, torch.device("cpu"))
    forward = 2 * 11 * (3 * 5 + 5 * 7) + 4 * 11**2 * 6 * 2
    images = 40 * passes + 20
    assert found.train_time_s == pytest.approx(forward * images * 3 / (1e6 * 0.4))
    assert found.weights_bytes == 8
    assert found.peak_train_bytes == 77 if peak else math.isnan(found.peak_train_bytes)
    assert asked == [("fp32", "cpu")]


def test_tokens_are_those_of_the_positions_else_of_a_vit_at_224():
    skeleton = Skeleton()
    assert estimates._tokens(skeleton) == 11
    skeleton.pos_embed = torch.nn.Parameter(torch.zeros(11, 6))
    assert estimates._tokens(skeleton) == 197
    assert estimates._tokens(torch.nn.Linear(1, 1)) == 197


def test_checkpointing_is_named_where_it_is_not_taken(tiny, monkeypatch):
    monkeypatch.setattr(estimates, "free_bytes", lambda device: 0)
    for taken in (False, True):
        config = tiny("none", training={"gradient_checkpointing": taken})
        with pytest.raises(UserError) as caught:
            refuse_what_cannot_fit(config, 10, torch.device("cpu"))
        assert ("gradient_checkpointing=true" in str(caught.value)) is not taken
        assert "size (20; " in str(caught.value)


@pytest.mark.parametrize(
    ("peak", "free", "times", "excess"),
    [
        (100, 100, 1, None),
        (100, 99, 1, (100, 99)),
        (100, 300, 3, None),
        (100, 299, 3, (100, 299)),
        (None, 1, 1, None),
        (100, None, 1, None),
    ],
)
def test_what_is_more_than_is_free(tiny, monkeypatch, peak, free, times, excess):
    prediction = SimpleNamespace(peak_train_bytes=peak)
    monkeypatch.setattr(estimates, "predict", lambda *_: prediction)
    monkeypatch.setattr(estimates, "free_bytes", lambda device: free)
    assert estimates._excess(tiny("none"), 10, torch.device("cpu"), times) == excess
