import pytest

from tests.tune_study.model.test_build import WHOLE_MODEL_BYTES
from tune_study.model.build import build_model
from tune_study.model.footprint import expected_weights_bytes
from tune_study.model.layers import skeleton_of

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
