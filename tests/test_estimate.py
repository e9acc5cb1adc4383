import pytest
import torch

from tune_study import train
from tune_study.data import load
from tune_study.estimate import Estimate, estimate, expected_weights_bytes, skeleton_of
from tune_study.model import build_model

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


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_expected_peak_is_within_what_it_claims(tiny, mode):
    config = tiny(mode)
    data = load("digits", None, config.data)
    training = train.start(config, build_model(config, 10), data, torch.device("cpu"))
    measured = train.measure_memory(training)
    expected = estimate(config, data, torch.device("cpu"))
    assert isinstance(expected, Estimate)
    assert expected.peak_train_bytes == pytest.approx(measured.peak_train_bytes, rel=0.25)
    assert expected.train_time_s > 0
