import copy
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from tune_study import model as models
from tune_study.config import UserError
from tune_study.model import base_bytes, build_model, load_base, trainable
from tune_study.quantize import QuantizationFailed, dequantize

MODES = ["none", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
# DESIGN.md's table: whole-model bytes, the residue at fp32, 10 classes.
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
    built = build_model(tiny(mode, model=name, pretrained=False, dataset="cifar10"), 10)
    assert built.weights_bytes == WHOLE_MODEL_BYTES[name, mode]
    assert built.base_parameters * 4 == WHOLE_MODEL_BYTES[name, "none"]
    assert len(built.layers) == (0 if mode == "none" else 48)


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


def test_pretrained_base_is_the_shipped_file_and_random_is_not(tiny):
    shipped = timm.create_model("vit_glyphs_patch4_32", pretrained=True).state_dict()
    built = load_base(tiny("none"), 10).state_dict()
    assert torch.equal(built["blocks.3.mlp.fc1.weight"], shipped["blocks.3.mlp.fc1.weight"])
    random = load_base(tiny("none", pretrained=False), 10).state_dict()
    assert not torch.equal(random["blocks.3.mlp.fc1.weight"], shipped["blocks.3.mlp.fc1.weight"])


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=7)
    path = tmp_path / "deit_tiny_patch16_224.safetensors"
    save_file(model.state_dict(), path)
    return path, model.state_dict()


def test_weights_from_a_file_or_a_folder(tiny, weights, tmp_path):
    path, state = weights
    config = tiny("none", model="deit_tiny_patch16_224")
    for where in (path, tmp_path):
        loaded = load_base(config, 10, where).state_dict()
        assert torch.equal(loaded["blocks.5.attn.qkv.weight"], state["blocks.5.attn.qkv.weight"])
        assert loaded["head.weight"].shape[0] == 10
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    loaded = load_base(config, 10, tmp_path / "wrapped.pth").state_dict()
    assert torch.equal(loaded["norm.weight"], state["norm.weight"])


def test_weights_at_another_image_size_are_resampled(tiny, weights):
    path, state = weights
    config = tiny("none", model="deit_tiny_patch16_224", data={"image_size": 112})
    base = load_base(config, 10, path)
    assert base.pos_embed.shape[1] == 50
    assert torch.equal(base.state_dict()["norm.weight"], state["norm.weight"])
    expected = resample_abs_pos_embed(state["pos_embed"], [7, 7], num_prefix_tokens=1)
    torch.testing.assert_close(base.pos_embed.data, expected)


@pytest.mark.parametrize("damage", ["other model", "gap", "text", "truncated", "pickle", "none"])
def test_weights_that_do_not_fit_are_refused_in_one_sentence(tiny, weights, tmp_path, damage):
    import pickle

    path, state = weights
    config = tiny("none", model="deit_tiny_patch16_224")
    if damage == "other model":
        config = tiny("none", model="deit_small_patch16_224")
    elif damage == "gap":
        save_file({k: v for k, v in state.items() if "blocks.3" not in k}, path)
    elif damage == "text":
        path.write_text("no weights")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "pickle":
        path = tmp_path / "evil.pth"
        path.write_bytes(pickle.dumps(print))
    else:
        path = tmp_path / "nowhere"
    with pytest.raises(UserError) as refused:
        load_base(config, 10, path)
    assert "\n" not in str(refused.value)
    if damage == "gap":
        assert "blocks.3" in str(refused.value)


def test_no_network_names_the_remedy(tiny, monkeypatch, tmp_path):
    import urllib.error
    import urllib.request

    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*args, **kwargs):
        raise LocalEntryNotFoundError("not cached")

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="--weights") as refused:
        load_base(tiny("none", model="deit_tiny_patch16_224"), 10)
    assert "pretrained=false" in str(refused.value)


def test_hub_weights_load_from_the_cached_file(tiny, weights, monkeypatch):
    import huggingface_hub

    path, state = weights
    asked = []

    def cached(repo, file, local_files_only=False):
        asked.append((repo, file))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    # The stand-in for the hub's file has 7 classes where timm expects 1000: the head is dropped.
    base = load_base(tiny("none", model="deit_tiny_patch16_224"), 10)
    assert asked == [("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")]
    assert torch.equal(
        base.state_dict()["blocks.2.mlp.fc2.weight"], state["blocks.2.mlp.fc2.weight"]
    )


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
    monkeypatch.setattr("tune_study.quantize.tell_peft", lambda *_: None)
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
