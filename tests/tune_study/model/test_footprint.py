import pytest
import torch

from tests.tune_study.model.test_build import WHOLE_MODEL_BYTES
from tune_study.model.build import build_model
from tune_study.model.footprint import (
    bytes_at,
    expected_state_bytes,
    expected_weights_bytes,
    linear_bytes,
)
from tune_study.model.layers import skeleton_of

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]


@pytest.mark.parametrize(("name", "mode"), WHOLE_MODEL_BYTES)
def test_expected_bytes_are_the_designs(tiny, name, mode):
    training = {"compute_dtype": "fp32"} if mode == "none" else {}
    config = tiny(mode, model=name, dataset="cifar10", training=training)
    assert (
        expected_weights_bytes(skeleton_of(name, 10, None), config)
        == (WHOLE_MODEL_BYTES[name, mode])
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("lora", [{}, {"bias": "all"}, {"use_dora": True}])
def test_expected_bytes_equal_the_built_model_to_the_byte(tiny, mode, dtype, lora):
    skipped = ["blocks.0.*"] if mode != "none" else []
    config = tiny(
        mode,
        quantization={"mode": mode, "skip_layers": skipped},
        lora=lora,
        training={"compute_dtype": dtype},
    )
    skeleton = skeleton_of(config.model, 10, None)
    assert expected_weights_bytes(skeleton, config) == build_model(config, 10).weights_bytes


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("int8", 5 * 13 + 4 * 5),
        ("nf4", 33 + 4 * 2 + 64),  # 65 weights: 33 bytes, 2 blocks
        ("fp4-dq", 33 + 2 + 4 + 64 + 256 * 4 + 4),
    ],
)
def test_bytes_of_a_layer_whose_weights_fill_no_block(mode, size):
    assert linear_bytes(5, 13, mode) == size


BLOCKS = 6 * (128 * 384 + 128 * 128 + 2 * 128 * 512)
BIASES = 6 * (384 + 128 + 512 + 128)


@pytest.mark.parametrize(
    ("lora", "numbers"),
    [({}, BLOCKS + BIASES), ({"bias": "all"}, BLOCKS), ({"use_dora": True}, 0)],
)
def test_plain_layers_of_a_bf16_trial_hold_two_bytes_a_number(tiny, lora, numbers):
    """Weights and biases of the blocks; not biases that learn, nor the layers of DoRA."""
    config = tiny("none", lora=lora)
    skeleton = skeleton_of(config.model, 10, None)
    full = bytes_at([*skeleton.parameters(), *skeleton.buffers()], 4)
    assert full - expected_weights_bytes(skeleton, config) == 2 * numbers


def test_scales_of_scales_come_in_blocks_of_256():
    for blocks, nested in ((256, 4), (257, 8)):
        weights = 64 * blocks
        expected = weights // 2 + blocks + nested + 64 + 1028
        assert linear_bytes(blocks, 64, "nf4-dq") == expected


@pytest.mark.parametrize("mode", MODES)
def test_state_bytes_are_those_of_the_built_layers(tiny, mode):
    config = tiny(mode)
    layers = build_model(config, 10).layers
    expected = expected_state_bytes(skeleton_of(config.model, 10, None), config.quantization)
    assert expected == sum(layer.state_bytes for layer in layers)
    assert (expected > 0) is (mode != "none")


def test_integers_keep_their_width():
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(5).bfloat16()]
    assert bytes_at(tensors, 2) == 6 + 16 + 10
    assert bytes_at(tensors, 4) == 12 + 16 + 20
