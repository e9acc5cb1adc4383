import copy
import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from tune_study.config import QuantizationConfig
from tune_study.errors import UserError
from tune_study.model import layers, quantize
from tune_study.model.quantize import QuantizationFailed

MODES = ["int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
# The codebooks of QLoRA (appendix E) and of bitsandbytes' fp4, in ascending order.
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
    + [0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
FP4 = torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25])
FP4 = torch.cat([FP4, -FP4])


class Blocks(nn.Module):
    """Two blocks with a ViT's names, and linear layers outside of them."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"qkv": nn.Linear(128, 192), "fc1": nn.Linear(128, 256)})
        self.blocks = nn.ModuleList([block, copy.deepcopy(block)])
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 10)


def linear(out_features=192, in_features=128, bias=True):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def blockwise(weights, codebook, scales=None):
    """Round to the nearest of ``codebook`` in blocks of 64: the slow, obvious quantizer."""
    blocks = weights.flatten().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True) if scales is None else scales
    nearest = (blocks / scales)[..., None].sub(codebook).abs().argmin(-1)
    return (codebook[nearest] * scales).view_as(weights)


@pytest.mark.parametrize(("mode", "codebook"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bit_weights_equal_the_obvious_quantizer(mode, codebook):
    original = linear()
    layer = quantize.quantize_linear(original, mode, torch.float32, "cpu")
    expected = blockwise(original.weight.data, codebook)
    # A weight half-way between two codes may round either way.
    differ = (quantize.dequantize(layer) - expected).abs() > 1e-4
    assert differ.float().mean() < 1e-3


def test_int8_weights_equal_row_wise_rounding():
    original = linear()
    layer = quantize.quantize_linear(original, "int8", torch.float32, "cpu")
    scales = original.weight.data.abs().amax(1, keepdim=True) / 127
    expected = (original.weight.data / scales).round() * scales
    steps = (quantize.dequantize(layer) - expected).abs() / scales
    # bitsandbytes takes the scales of the float16 weights: now and then the next step.
    assert steps.max() < 1.1
    assert (steps > 0.1).float().mean() < 0.05


def test_double_quantization_is_close_to_single():
    original = linear()
    errors = {}
    for mode in ("nf4", "nf4-dq", "fp4", "fp4-dq"):
        layer = quantize.quantize_linear(original, mode, torch.float32, "cpu")
        error = (quantize.dequantize(layer) - original.weight.data).norm()
        errors[mode] = float(error / original.weight.data.norm())
    assert abs(errors["nf4"] - errors["nf4-dq"]) < 2e-3
    assert errors["nf4"] != errors["nf4-dq"]  # the second quantization did happen
    assert abs(errors["fp4"] - errors["fp4-dq"]) < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_layer_computes_with_its_dequantized_weights(mode):
    layer = quantize.quantize_linear(linear(), mode, torch.float32, "cpu").eval()
    plain = nn.Linear(128, 192)
    plain.weight.data, plain.bias.data = quantize.dequantize(layer), layer.bias.data.clone()
    images = torch.randn(7, 128)
    # LLM.int8() quantizes the activations too; 4 bit does not.
    tolerance = 3e-2 if mode == "int8" else 1e-4
    torch.testing.assert_close(layer(images), plain(images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_settings_are_the_modes_and_not_the_librarys_defaults(mode):
    layer = quantize.quantize_linear(linear(), mode, torch.bfloat16, "cpu")
    if mode == "int8":
        assert layer.state.has_fp16_weights is False
        assert layer.state.threshold == 6.0
    else:
        state = layer.weight.quant_state
        assert state.quant_type == mode[:3]
        assert state.nested is mode.endswith("-dq")
        assert state.blocksize == 64
        assert layer.compute_dtype == torch.bfloat16
        assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("mode", MODES)
def test_gaussian_error_is_in_its_band(mode):
    low, high = quantize.GAUSSIAN_ERROR_BANDS[mode]
    assert low < quantize.check_kernel(mode, 512, "cpu") < high


def test_a_kernel_that_returns_other_weights_is_refused(monkeypatch):
    true = quantize.dequantize
    monkeypatch.setattr(quantize, "dequantize", lambda layer: true(layer).roll(1))
    quantize.check_kernel.cache_clear()
    with pytest.raises(QuantizationFailed, match="choose another mode, model or device"):
        quantize.check_kernel("nf4", 192, "cpu")
    quantize.check_kernel.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_only_block_layers_are_quantized(mode):
    model = Blocks()
    config = QuantizationConfig(mode=mode)
    reports = quantize.quantize_model(model, config, torch.float32, torch.device("cpu"))
    assert sorted(report.name for report in reports) == [
        "blocks.0.fc1",
        "blocks.0.qkv",
        "blocks.1.fc1",
        "blocks.1.qkv",
    ]
    assert type(model.head) is nn.Linear
    kind = bnb.nn.Linear8bitLt if mode == "int8" else bnb.nn.Linear4bit
    assert all(isinstance(b[name], kind) for b in model.blocks for name in ("qkv", "fc1"))
    assert model.is_loaded_in_8bit is (mode == "int8")
    assert model.is_loaded_in_4bit is (mode != "int8")


def test_report_measures_the_error_and_the_bytes():
    model = Blocks()
    original = model.blocks[0]["qkv"].weight.detach().clone()
    report = quantize.quantize_model(
        model, QuantizationConfig(mode="nf4"), torch.float32, torch.device("cpu")
    )[0]
    restored = quantize.dequantize(model.blocks[0]["qkv"])
    assert report.relative_error == pytest.approx(
        float((restored - original).norm() / original.norm())
    )
    noise = (restored - original).square().mean()
    expected_db = 10 * torch.log10(original.square().mean() / noise)
    assert report.sqnr_db == pytest.approx(float(expected_db), rel=1e-5)
    assert report.weight_bytes == 192 * 128 // 2
    assert report.state_bytes == 192 * 128 // 64 * 4 + 16 * 4


def test_mixed_precision():
    model = Blocks()
    config = QuantizationConfig(
        mode="nf4", skip_layers=("blocks.0.qkv",), overrides={"blocks.1.*": "int8"}
    )
    reports = quantize.quantize_model(model, config, torch.float32, torch.device("cpu"))
    assert {r.name: r.mode for r in reports} == {
        "blocks.0.fc1": "nf4",
        "blocks.1.qkv": "int8",
        "blocks.1.fc1": "int8",
    }
    assert type(model.blocks[0]["qkv"]) is nn.Linear
    with pytest.raises(UserError, match=r"blocks\.7"):
        layers.plan_layers(Blocks(), QuantizationConfig(mode="nf4", skip_layers=("blocks.7.*",)))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no linear layers in blocks"):
        layers.plan_layers(nn.Sequential(nn.Linear(4, 4)), QuantizationConfig(mode="nf4"))


def test_quantization_that_did_not_happen_is_an_error(monkeypatch):
    """The fault of the earlier study: a layer that keeps its full-precision weights."""
    monkeypatch.setattr(quantize, "quantize_linear", lambda linear, *_: linear)
    monkeypatch.setattr(quantize, "check_kernel", lambda *_: 0.09)
    with pytest.raises((QuantizationFailed, TypeError)):
        quantize.quantize_model(
            Blocks(), QuantizationConfig(mode="nf4"), torch.float32, torch.device("cpu")
        )


@pytest.mark.parametrize("change", ["class", "dtype", "bytes", "exact", "garbage"])
def test_each_proof_can_fail(change):
    report = quantize.quantize_model(
        Blocks(), QuantizationConfig(mode="nf4"), torch.float32, torch.device("cpu")
    )[0]
    quantize._prove(report)
    wrong = {
        "class": {"layer_class": "Linear"},
        "dtype": {"dtype": "float32"},
        "bytes": {"weight_bytes": report.weight_bytes * 8},
        "exact": {"error_norm": 0.0},
        "garbage": {"error_norm": report.weight_norm},
    }[change]
    with pytest.raises(QuantizationFailed, match=r"blocks\.0\.qkv"):
        quantize._prove(report._replace(**wrong))


@pytest.mark.skipif(
    not hasattr(bnb.functional, "has_avx512bf16") or not bnb.functional.has_avx512bf16(),
    reason="the fault shows on CPUs with AVX512-BF16 only",
)
def test_train_eval_train_keeps_weights_and_gradient():
    """bitsandbytes repacks the weights at the first eval forward, unless it is switched off."""
    layer = quantize.quantize_linear(linear(), "nf4", torch.bfloat16, "cpu")
    before = quantize.dequantize(layer)
    images = torch.randn(4, 128, requires_grad=True)

    def gradient():
        layer.train()
        return torch.autograd.grad(layer(images).sum(), images)[0]

    first = gradient()
    layer.eval()
    with torch.no_grad():
        layer(images.detach())
    assert torch.equal(gradient(), first)
    assert torch.equal(quantize.dequantize(layer), before)


def report(**fields):
    values = {"name": "n", "mode": "nf4", "layer_class": "Linear4bit", "dtype": "uint8"}
    values |= {"shape": (4, 6), "weight_bytes": 12, "state_bytes": 5}
    return quantize.LayerReport(**{**values, "error_norm": 1.0, "weight_norm": 10.0, **fields})


def test_a_report_without_error_or_weights():
    assert report().relative_error == 0.1
    assert report().sqnr_db == pytest.approx(20)
    assert report(error_norm=0.0).sqnr_db == math.inf
    assert math.isnan(report(weight_norm=0.0).relative_error)


@pytest.mark.parametrize(
    ("mode", "most"), [("int8", 0.1), ("nf4", 0.25), ("nf4-dq", 0.25), ("fp4", 0.3)]
)
def test_the_weight_error_has_a_limit_of_its_mode(mode, most):
    kind = {"layer_class": "Linear8bitLt", "dtype": "int8", "weight_bytes": 24}
    kind = kind if mode == "int8" else {}
    quantize._prove(report(mode=mode, error_norm=10 * most - 0.01, **kind))
    with pytest.raises(QuantizationFailed, match="weight error"):
        quantize._prove(report(mode=mode, error_norm=10 * most, **kind))
    with pytest.raises(QuantizationFailed, match="bytes are not"):
        quantize._prove(report(mode=mode, **{**kind, "weight_bytes": 25}))


@pytest.mark.parametrize(
    ("mode", "band"),
    [
        ("int8", (0.004, 0.015)),
        ("nf4", (0.08, 0.11)),
        ("nf4-dq", (0.08, 0.11)),
        ("fp4", (0.10, 0.14)),
        ("fp4-dq", (0.10, 0.14)),
    ],
)
def test_the_bands_of_gaussian_errors(mode, band):
    assert quantize.GAUSSIAN_ERROR_BANDS[mode] == band


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_without_a_bias_is_frozen_and_has_none(mode):
    layer = quantize.quantize_linear(linear(bias=False), mode, torch.float32, "cpu")
    assert layer.bias is None
    layer = quantize.quantize_linear(linear(), mode, torch.float32, "cpu")
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(layer.bias, linear().bias)
    scales = 4 * 192 if mode == "int8" else None
    assert scales in (None, quantize.tensor_bytes(quantize.state_tensors(layer)))
    assert layer(torch.zeros(1, 128)).shape == (1, 192)


def test_bytes_count_a_tensor_once():
    one, other = torch.zeros(3), torch.zeros(5, dtype=torch.uint8)
    assert quantize.tensor_bytes([one, other, one, one.view(3), torch.zeros(3)]) == 29


def test_what_autocast_would_cast_is_cast():
    x = torch.zeros(2)
    assert quantize.autocasted(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert quantize.autocasted(x).dtype == torch.bfloat16


def test_a_layer_that_is_not_quantized_has_no_state():
    assert quantize.state_tensors(linear()) == []
    with pytest.raises(TypeError, match="Linear is not a quantized layer"):
        quantize.dequantize(linear())
