"""How adapters begin: as PEFT, as the papers say, and what the proofs see."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tune_study.errors import UserError
from tune_study.model import initial
from tune_study.model.build import build_model, learning_biases, trainable
from tune_study.model.initial import effective_weight, loftq, lora_layers
from tune_study.model.layers import block_linears
from tune_study.model.quantize import QuantizationFailed, dequantize, dequantized
from tune_study.model.weights import load_base
from tune_study.trial.execution import save_adapter

FP32 = {"compute_dtype": "fp32"}


def full_weights(config):
    torch.manual_seed(config.seed)
    return {n: m.weight.detach() for n, m in block_linears(load_base(config, 10)).items()}


def stirred(built):
    """As if it had been trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(built.model).values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return built


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_at_full_precision_it_is_pefts_own_to_the_bit(tiny, how):
    lora = {"init_lora_weights": how, "rank_pattern": {"qkv": 2}}
    config = tiny("none", lora=lora, training=FP32)
    ours = dict(lora_layers(build_model(config, 10).model))
    in_bf16 = dict(lora_layers(build_model(tiny("none", lora=lora), 10).model))
    theirs = pefts(config)
    for name, layer in lora_layers(theirs):
        assert torch.equal(in_bf16[name].base_layer.weight, layer.base_layer.weight.bfloat16())
        assert torch.equal(ours[name].base_layer.weight, layer.base_layer.weight), name
        for part in ("lora_A", "lora_B"):
            mine, other = (getattr(one, part)["default"].weight for one in (ours[name], layer))
            assert torch.equal(mine, other), name


def test_the_sketched_decomposition_is_pefts_own(tiny):
    layer = dict(lora_layers(pefts(tiny("none"))))["blocks.1.attn.proj"]
    weight = layer.base_layer.weight.detach().clone()
    torch.manual_seed(5)
    layer.pissa_init("default", "pissa_niter_3")
    torch.manual_seed(5)
    factors = initial.principal(weight, 4, 2.0, 3)
    assert torch.equal(factors.a, layer.lora_A["default"].weight)
    assert torch.equal(factors.b, layer.lora_B["default"].weight)


def pefts(config):
    base, spec = load_base(config, 10), config.lora
    how = True if spec.init_lora_weights == "default" else spec.init_lora_weights
    lora = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=spec.target_modules,
        init_lora_weights=how,
        rank_pattern=dict(spec.rank_pattern),
    )
    return get_peft_model(base, lora)


@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_loftq_is_algorithm_1_of_its_paper(tiny, mode):
    """With numpy's decomposition, and PEFT's scaling of 2 in both."""
    weight = full_weights(tiny("none"))["blocks.1.attn.proj"]

    def quantizer(w):
        return dequantized(w, mode, torch.float32, "cpu")

    product = np.zeros(weight.shape, dtype="float32")
    errors = []
    for _ in range(3):
        left = quantizer(weight - torch.from_numpy(product)).numpy()
        u, s, vh = np.linalg.svd(weight.numpy() - left, full_matrices=False)
        product = (u[:, :4] * s[:4]) @ vh[:4]
        errors.append(float(np.linalg.norm(weight.numpy() - left - product)))
    factors, rest = loftq(weight, 4, 2.0, quantizer, 3)
    found = float((weight - quantizer(rest) - factors.product(2.0)).norm())
    assert found == pytest.approx(errors[-1], rel=1e-3)
    alone = float((weight - quantizer(weight)).norm())
    assert alone > errors[0] > errors[1] > errors[2]
    one = loftq(weight, 4, 2.0, quantizer, 1)
    assert torch.equal(one[1], weight)  # PEFT's only step: the base is the plain quantized one


@pytest.mark.parametrize("how", ["loftq", "pissa", "pissa_niter_4"])
@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_base_and_adapters_together_are_closer_than_the_quantized_base(tiny, mode, how):
    config = tiny(mode, lora={"init_lora_weights": how, "loftq_iter": 3, "use_rslora": True})
    built, weights = build_model(config, 10), full_weights(config)
    layers = dict(lora_layers(built.model))
    assert len(built.factors) == len(built.initial) == len(layers) == 24
    for name, found in built.initial.items():
        weight, layer = weights[name], layers[name]
        now = dequantize(layer.base_layer) + layer.scaling["default"] * (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        alone = dequantized(weight, mode, torch.bfloat16, "cpu")
        assert float((weight - now).detach().norm()) == pytest.approx(found.error_norm, rel=1e-4)
        assert float((weight - alone).norm()) == pytest.approx(found.alone_norm, rel=1e-4)
        assert found.error_norm < found.alone_norm
    plain = build_model(tiny(mode), 10)
    assert plain.initial_error == plain.quantization_error
    assert built.initial_error < 0.97 * plain.initial_error


def test_loftq_of_an_unquantized_base_is_the_default(tiny):
    plain, other = (
        trainable(build_model(tiny("none", lora={"init_lora_weights": how}), 10).model)
        for how in ("default", "loftq")
    )
    assert all(torch.equal(other[name], value) for name, value in plain.items())
    mixed = {"mode": "nf4", "skip_layers": ["blocks.0.*"]}
    built = build_model(tiny("nf4", quantization=mixed, lora={"init_lora_weights": "loftq"}), 10)
    assert not any(name.startswith("blocks.0.") for name in built.factors)
    drawn = trainable(built.model)["blocks.0.attn.qkv.lora_A"]
    assert torch.equal(drawn, plain["blocks.0.attn.qkv.lora_A"])


@pytest.mark.parametrize(
    "spec",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2", "use_dora": True},
        {"init_lora_weights": "olora", "use_rslora": True},
        {"use_dora": True, "bias": "all"},
        {"lora_bias": True, "bias": "lora_only"},
    ],
)
def test_all_modes_of_a_seed_begin_with_the_same(tiny, spec):
    states = [trainable(build_model(tiny(m, lora=spec), 10).model) for m in ("none", "int8", "nf4")]
    for name, value in states[0].items():
        assert all(torch.equal(state[name], value) for state in states[1:]), name
    assert all(list(state) == list(states[0]) for state in states)


def test_drawn_adapters_are_what_they_are_called(tiny):
    gaussian = trainable(build_model(tiny("nf4", lora={"init_lora_weights": "gaussian"}), 10).model)
    a = torch.cat([p.flatten() for n, p in gaussian.items() if n.endswith("lora_A")])
    assert float(a.std()) == pytest.approx(1 / 4, rel=0.02)
    built = build_model(tiny("nf4", lora={"init_lora_weights": "orthogonal"}), 10)
    for _, layer in lora_layers(built.model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert float((b @ a).norm()) < 1e-5 * float(a.norm() * b.norm())
        assert a.any()
        assert b.any()


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_dora_begins_at_the_full_precision_row_norms(tiny, mode):
    config = tiny(mode, lora={"use_dora": True})
    built, weights = build_model(config, 10), full_weights(config)
    for name, layer in lora_layers(built.model):
        norms = weights[name].norm(dim=1)
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, rtol=1e-6)
        assert torch.allclose(effective_weight(layer).norm(dim=1), norms, rtol=1e-5)
    assert (built.initial_error == 0) == (mode == "none")


@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_quantized_dora_is_plain_linear_algebra_on_the_dequantized_weights(tiny, mode):
    """Several passes: after one, PEFT's own way has lost the scales of int8 on a CPU."""
    config = tiny(mode, lora={"use_dora": True, "lora_dropout": 0.0}, training=FP32)
    model = stirred(build_model(config, 10)).model.train()
    layer = dict(lora_layers(model))["blocks.2.mlp.fc1"]
    x = torch.randn(3, 7, 128)
    expected = nn.functional.linear(x, effective_weight(layer), layer.base_layer.bias)
    for _ in range(3):
        found = layer(x)
        assert float((found - expected).norm() / expected.norm()) < 1e-3
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert layer.lora_magnitude_vector["default"].weight.grad.any()


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_a_bias_that_learns_is_float32_and_has_the_gradient_of_a_plain_layer(tiny, mode):
    """bitsandbytes casts a layer's bias to the type of its input, in place."""
    config = tiny(mode, lora={"bias": "lora_only", "lora_dropout": 0.0})
    built = build_model(config, 10)
    assert len(learning_biases(built.model)) == 24
    inner = dict(lora_layers(built.model))["blocks.0.attn.qkv"].base_layer.train()
    x, upstream = torch.randn(5, 128), torch.randn(5, 384)
    for dtype in (torch.bfloat16, torch.float32):
        inner.bias.grad = None
        (inner(x.to(dtype)).float() * upstream).sum().backward()
        assert inner.bias.dtype == torch.float32
        near = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(inner.bias.grad, upstream.sum(0), rtol=near, atol=near)
    fixed = inner(x)
    with torch.no_grad():
        inner.bias.add_(1)
    assert torch.allclose(inner(x), fixed + 1, atol=1e-5)


def test_which_biases_learn(tiny):
    def names(bias):
        return set(trainable(build_model(tiny("nf4", lora={"bias": bias}), 10).model))

    plain, own, every = names("none"), names("lora_only"), names("all")
    assert own - plain == {f"{n}.bias" for n in full_weights(tiny("none"))}
    assert {"patch_embed.proj.bias", "blocks.3.norm1.bias", "norm.bias"} <= every - own
    assert plain < own < every


def test_patterns_are_pefts(tiny):
    spec = {
        "rank_pattern": {"attn.qkv": 2, r"blocks\.1\..*": 6, r"mlp\.fc[12]": 8},
        "alpha_pattern": {r"blocks\.0\.mlp\.fc1": 5, "fc1": 7},
        "use_rslora": True,
        "layers_to_transform": [0, 1, 3],
        "exclude_modules": r"blocks\.3\.mlp.*",
    }
    config = tiny("none", lora=spec)
    layers = dict(lora_layers(build_model(config, 10).model))
    assert len(layers) == 10
    for name, layer in layers.items():
        assert layer.r["default"] == config.lora.rank_of(name)
        assert layer.scaling["default"] == config.lora.scaling_of(name)
    ranks = [layers[n].r["default"] for n in ("blocks.1.attn.qkv", "blocks.1.mlp.fc1")]
    assert ranks == [2, 6]  # the first that matches
    assert config.lora.scaling_of("blocks.0.mlp.fc1") == pytest.approx(5 / math.sqrt(8))
    assert config.lora.scaling_of("blocks.0.attn.proj") == 8 / 2
    assert config.lora.scaling_of("blocks.1.mlp.fc1") == pytest.approx(7 / math.sqrt(6))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rank_pattern": {"fc9": 2}}, "rank_pattern: fc9 matches no adapted layer"),
        ({"alpha_pattern": {"head": 2}}, "alpha_pattern: head matches no adapted layer"),
        ({"layers_to_transform": [9]}, "leave no layer"),
        ({"exclude_modules": ".*"}, "leave no layer"),
        ({"init_lora_weights": "pissa", "r": 129}, "fewer than its rank 129"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny, spec, words):
    with pytest.raises(UserError, match=words):
        build_model(tiny("none", lora=spec), 10)


def test_adapters_at_another_scale_are_found(tiny, monkeypatch):
    real = initial.principal
    monkeypatch.setattr(initial, "principal", lambda w, r, s, n=None: real(w, r, s, n))
    monkeypatch.setattr(initial.Factors, "product", lambda self, scaling: self.b @ self.a)
    for mode in ("none", "nf4"):
        with pytest.raises(QuantizationFailed, match="begins with a weight error of"):
            build_model(tiny(mode, lora={"init_lora_weights": "pissa"}), 10)


def test_an_initialisation_that_makes_it_worse_is_found(tiny, monkeypatch):
    """OLoRA's factors take nothing off the error: under PiSSA's name they are refused."""
    monkeypatch.setattr(initial, "principal", lambda w, r, *_: initial.orthonormal(w, r))
    with pytest.raises(QuantizationFailed, match=r"alone has .*; choose another initialisation"):
        build_model(tiny("nf4", lora={"init_lora_weights": "pissa"}), 10)


@pytest.mark.parametrize(
    "spec",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"qkv": 2}},
        {"init_lora_weights": "pissa", "use_dora": True, "alpha_pattern": {"fc1": 3}},
        {"init_lora_weights": "orthogonal", "bias": "all"},
        {"lora_bias": True, "exclude_modules": ".*fc2"},
    ],
)
def test_plain_peft_loads_the_saved_adapter_onto_the_original_base(tiny, tmp_path: Path, spec):
    built = stirred(build_model(tiny("none", lora=spec, training=FP32), 10))
    config = copy.deepcopy(built.model.peft_config["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes lora_bias for a shard
        save_adapter(built, tmp_path, "base")
    config.base_model_name_or_path = "base"
    assert built.model.peft_config["default"] == config
    torch.manual_seed(42)
    loaded = PeftModel.from_pretrained(load_base(tiny("none"), 10), tmp_path).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), built.model.eval()(images), atol=1e-5)


def test_over_a_quantized_base_the_saved_adapter_is_what_training_added(tiny, tmp_path: Path):
    config = tiny("nf4", lora={"init_lora_weights": "loftq"}, training=FP32)
    first = build_model(config, 10)
    before = {name: effective_weight(layer) for name, layer in lora_layers(first.model)}
    built = stirred(first)
    save_adapter(built, tmp_path, "base")
    torch.manual_seed(42)
    loaded = PeftModel.from_pretrained(load_base(tiny("none"), 10), tmp_path)
    weights, trained = full_weights(config), dict(lora_layers(built.model))
    for name, layer in lora_layers(loaded):
        added = effective_weight(trained[name]) - before[name]
        assert torch.allclose(effective_weight(layer) - weights[name], added, atol=1e-5)
