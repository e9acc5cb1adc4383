import copy
import math
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from tune_study.errors import UserError
from tune_study.model import build as models
from tune_study.model.build import build_model, trainable
from tune_study.model.footprint import base_bytes
from tune_study.model.quantize import QuantizationFailed, dequantize

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
# DESIGN.md's table: whole-model bytes, the residue at fp32, 10 classes; "none" computes in fp32.
WHOLE_MODEL_BYTES = {
    ("deit_tiny_patch16_224", "none"): 22_105_384,
    ("deit_tiny_patch16_224", "int8"): 6_263_080,
    ("deit_tiny_patch16_224", "nf4"): 3_860_776,
    ("deit_tiny_patch16_224", "nf4-dq"): 3_662_632,
    ("deit_small_patch16_224", "none"): 86_678_056,
    ("deit_small_patch16_224", "int8"): 23_142_952,
    ("deit_small_patch16_224", "nf4"): 13_690_408,
    ("deit_small_patch16_224", "nf4-dq"): 12_749_608,
}


@pytest.mark.parametrize(("name", "mode"), WHOLE_MODEL_BYTES)
def test_whole_model_bytes(tiny, name, mode):
    training = {"compute_dtype": "fp32"} if mode == "none" else {}
    config = tiny(mode, model=name, pretrained=False, dataset="cifar10", training=training)
    built = build_model(config, 10)
    assert built.weights_bytes == WHOLE_MODEL_BYTES[name, mode]
    assert built.base_parameters * 4 == WHOLE_MODEL_BYTES[name, "none"]
    assert len(built.layers) == (0 if mode == "none" else 48)


def fresh_gradients(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.train()(images)
    nn.functional.cross_entropy(scores.float(), torch.arange(len(images))).backward()
    found = {name: p.grad for name, p in trainable(model).items()}
    for parameter in trainable(model).values():
        parameter.grad = None
    return scores, found


def stirred(config):
    model = build_model(config, 10).model
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def assert_bits_stay(model, change):
    images = torch.randn(3, 3, 32, 32)
    scores, gradients = fresh_gradients(model, images)
    change()
    again, others = fresh_gradients(model, images)
    assert torch.equal(scores, again)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_weights_in_the_compute_dtype_give_the_bits_that_autocast_gives(tiny):
    plain = {"lora_dropout": 0.0}
    model = stirred(tiny("none", lora=plain))
    fp32 = tiny("none", lora=plain, training={"compute_dtype": "fp32"})
    full = build_model(fp32, 10).model.state_dict()
    held = {n: p for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert len(held) == 2 * 4 * 6
    assert all(n.endswith(("base_layer.weight", "base_layer.bias")) for n in held)
    assert all(torch.equal(p, full[n].bfloat16()) for n, p in held.items())
    assert not all(torch.equal(p.float(), full[n]) for n, p in held.items())

    def at_full_precision():
        for name, parameter in held.items():
            parameter.data = full[name]

    assert_bits_stay(model, at_full_precision)


def test_backward_of_4_bit_dequantizes_into_the_compute_dtype_to_the_same_bits(tiny):
    model = stirred(tiny("nf4-dq", lora={"lora_dropout": 0.0}))
    layers = [m for m in model.modules() if type(m) is Linear4bit]
    states = [layer.weight.quant_state for layer in layers]
    assert len(states) == 24
    assert all(state.dtype == torch.bfloat16 for state in states)

    def by_fp32():
        for state in states:
            state.dtype = torch.float32

    assert_bits_stay(model, by_fp32)


@pytest.mark.parametrize("mode", MODES)
def test_what_learns_is_adapters_and_head_alone(tiny, mode):
    built = build_model(tiny(mode), 10)
    names = list(trainable(built.model))
    assert len(names) == 2 * 4 * 6 + 2
    assert sum("lora_" in name for name in names) == 48
    assert [name for name in names if "lora_" not in name] == ["head.weight", "head.bias"]
    learning = {id(p) for p in trainable(built.model).values()}
    assert all(id(p) in learning for p in built.model.parameters() if p.requires_grad)
    assert not any(
        "patch_embed" in n and p.requires_grad for n, p in built.model.named_parameters()
    )


@pytest.mark.parametrize("mode", MODES)
def test_quantized_lora_equals_plain_lora_on_the_dequantized_weights(tiny, mode):
    """The independent answer: the same adapters in a full-precision model with those weights."""
    config = tiny(mode, training={"compute_dtype": "fp32"})
    built = build_model(config, 10)
    twin = build_model(tiny("none", training={"compute_dtype": "fp32"}), 10)
    with torch.no_grad():
        for name, parameter in trainable(twin.model).items():
            value = torch.randn_like(parameter) * 0.05  # B is not 0, so that the adapters count
            parameter.copy_(value)
            trainable(built.model)[name].copy_(value)
        for layer in built.layers:
            inner = built.model.base_model.model.get_submodule(layer.name).base_layer
            plain = twin.model.base_model.model.get_submodule(layer.name).base_layer
            plain.weight.copy_(dequantize(inner))
    images = torch.randn(4, 3, 32, 32)
    built.model.eval()
    twin.model.eval()
    scores, expected = built.model(images), twin.model(images)
    tolerance = 5e-2 if mode == "int8" else 1e-3  # LLM.int8() rounds the activations as well
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)
    # And the gradients that reach the adapters through the quantized layers.
    labels = torch.arange(4)
    for model in (built.model, twin.model):
        nn.functional.cross_entropy(model(images), labels).backward()
    ours = torch.cat([p.grad.flatten() for p in trainable(built.model).values()])
    theirs = torch.cat([p.grad.flatten() for p in trainable(twin.model).values()])
    cosine = nn.functional.cosine_similarity(ours, theirs, dim=0)
    assert cosine > (0.99 if mode == "int8" else 0.99999)


def test_modes_of_one_seed_start_from_the_same_adapters_and_head(tiny):
    states = [
        {n: p.detach().clone() for n, p in trainable(build_model(tiny(m), 10).model).items()}
        for m in ("none", "int8", "nf4")
    ]
    for name, value in states[0].items():
        assert all(torch.equal(state[name], value) for state in states[1:]), name
    other = trainable(build_model(tiny("none", seed=1), 10).model)
    assert not torch.equal(other["head.weight"], states[0]["head.weight"])
    assert not torch.equal(other["blocks.0.attn.qkv.lora_A"], states[0]["blocks.0.attn.qkv.lora_A"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "no_such_model"}, "timm has no such model"),
        ({"model": "resnet18", "pretrained": False}, "lora.target_modules"),
        ({"lora": {"target_modules": "nothing"}}, "lora.target_modules"),
        ({"data": {"image_size": 34}}, "multiple"),
    ],
)
def test_models_that_cannot_be_built_are_refused(tiny, fields, words):
    with pytest.raises(UserError, match=words):
        build_model(tiny("none", **fields), 10)


def test_a_model_whose_rows_share_blocks_is_refused_on_the_cpu(tiny):
    """bitsandbytes 0.50.2 returns wrong weights for 96 columns with AVX512, right ones without."""
    config = tiny(
        "nf4",
        model="swin_tiny_patch4_window7_224",
        pretrained=False,
        lora={"target_modules": r".*\.attn\.qkv"},
    )
    try:
        fixed = build_model(config, 10).quantization_error < 0.11
    except UserError as error:
        fixed = "96 columns" in str(error)
    assert fixed


def test_missing_peft_marks_are_found(tiny, monkeypatch):
    """Without them PEFT wraps the quantized layers as plain ones, without an error."""
    monkeypatch.setattr("tune_study.model.quantize.tell_peft", lambda *_: None)
    with pytest.raises(QuantizationFailed, match="should be a peft"):
        build_model(tiny("nf4"), 10)


def test_quantization_that_was_skipped_is_found(tiny, monkeypatch):
    monkeypatch.setattr(models, "quantize_model", lambda *_: [])
    with pytest.raises(QuantizationFailed, match="quantized no layer"):
        build_model(tiny("nf4"), 10)


def test_an_untrained_head_is_found(tiny, monkeypatch):
    original = models.LoraConfig
    monkeypatch.setattr(
        models, "LoraConfig", lambda **k: original(**{**k, "modules_to_save": None})
    )
    with pytest.raises(QuantizationFailed, match="head is not trained"):
        build_model(tiny("none"), 10)


def test_a_model_is_fresh_each_time(tiny):
    first = build_model(tiny("nf4"), 10)
    before = copy.deepcopy({n: p.detach() for n, p in trainable(first.model).items()})
    with torch.no_grad():
        for parameter in first.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    again = trainable(build_model(tiny("nf4"), 10).model)
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_quantization_error_is_over_all_layers(tiny):
    built = build_model(tiny("int8"), 10)
    errors = math.sqrt(sum(layer.error_norm**2 for layer in built.layers))
    norms = math.sqrt(sum(layer.weight_norm**2 for layer in built.layers))
    assert built.quantization_error == pytest.approx(errors / norms)
    assert 0 < built.quantization_error < 0.02
    assert build_model(tiny("none"), 10).quantization_error == 0
    assert base_bytes(nn.Linear(3, 2)) == 4 * 8


def test_the_quantized_blocks_are_named(tiny):
    def blocks(**quantization):
        return build_model(tiny("nf4", quantization=quantization), 10).quantized_blocks

    assert blocks(mode="none") == "none"
    assert blocks(mode="nf4") == "0-5"
    assert blocks(mode="nf4", skip_layers=["blocks.1.*"]) == "0,2-5"
    assert blocks(mode="none", overrides={"blocks.3.attn.*": "int8"}) == "3"


def test_what_is_adapted_is_what_the_configuration_says(tiny):
    config = tiny("nf4", lora={"r": 3, "lora_alpha": 12, "lora_dropout": 0.25})
    built = build_model(config, 10)
    layer = built.model.base_model.model.blocks[1].attn.qkv
    assert (layer.r["default"], layer.scaling["default"]) == (3, 4.0)
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].weight.shape == (3, 128)
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("mode", ["none", "nf4-dq"])
def test_bytes_at_other_widths_and_of_what_can_be_quantized(tiny, mode):
    built = build_model(tiny(mode), 10)
    assert built.bytes_fp32 == 4 * built.base_parameters
    assert built.bytes_16bit == 2 * built.base_parameters
    weights = 6 * (128 * 384 + 128 * 128 + 2 * 128 * 512)  # of the six blocks
    if mode == "none":
        assert built.quantizable_bytes == 2 * weights
    else:
        layers = built.layers
        expected = sum(layer.weight_bytes + layer.state_bytes for layer in layers)
        assert built.quantizable_bytes == expected
        assert sum(layer.weight_bytes for layer in layers) == weights // 2


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [("cpu", "bf16", False), ("cpu", "fp32", True), ("meta", "bf16", True)],
)
def test_plain_attention_is_for_bf16_on_the_cpu(tiny, device, dtype, fused):
    module = nn.Module()
    module.fused_attn = True
    config = tiny("none", training={"compute_dtype": dtype})
    models.choose_attention(nn.ModuleList([module]), config, torch.device(device))
    assert module.fused_attn is fused


@pytest.mark.parametrize(
    ("interpolation", "taken"),
    [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("random", "bicubic")],
)
def test_images_are_prepared_as_timm_says(tiny, monkeypatch, interpolation, taken):
    wanted = {"input_size": (3, 20, 24), "interpolation": interpolation}
    wanted |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    monkeypatch.setattr(models, "resolve_model_data_config", lambda model: wanted)
    model = nn.Module()
    model.patch_embed = SimpleNamespace(patch_size=(8, 8))
    found = models.preprocessing_of(model, tiny("none"))
    assert found == (24, taken, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert models.preprocessing_of(model, tiny("none", data={"image_size": 16}))[0] == 16
    refused = (((8, 8), 9, 8), ((8, 8), 29, 32), (8, 9, 8))  # XCiT's is a number
    for patch, size, near in refused:
        model.patch_embed.patch_size = patch
        with pytest.raises(UserError, match=f"patches of 8 px; choose a multiple, such as {near}$"):
            models.preprocessing_of(model, tiny("none", data={"image_size": size}))
    assert models.preprocessing_of(nn.Module(), tiny("none", data={"image_size": 9}))[0] == 9


def test_the_error_over_all_layers_weighs_them_by_their_norms():
    layer = models.LayerReport("blocks.0.x", "nf4", "c", "d", (1, 1), 1, 1, 3.0, 6.0)
    layers = [layer, layer._replace(error_norm=4.0, weight_norm=8.0)]
    built = models.BuiltModel(None, layers, None, 0, 0, 0, 0, 0, {}, {})
    assert built.quantization_error == pytest.approx(5 / 10)
    assert built._replace(layers=[]).quantization_error == 0
