"""Where a model's layers are, whether they act, and what is refused because it would not."""

import re

import pytest
import timm
import torch
from torch import nn

from tune_study.config import parse_trial
from tune_study.errors import UserError
from tune_study.memory.predict import predict
from tune_study.model.build import build_model
from tune_study.model.footprint import bytes_at
from tune_study.model.layers import (
    adapted,
    block_linears,
    block_ranges,
    called_linears,
    passed_over,
    plan_layers,
    refuse_without_effect,
    skeleton_of,
)
from tune_study.model.quantize import check_kernel

SWIN = "swin_tiny_patch4_window7_224"
DEFAULT = parse_trial({"model": "m", "dataset": "digits"}).lora.target_modules


def trial(model, mode="none", **fields):
    fields.setdefault("training", {"compute_dtype": "fp32"})
    values = {"model": model, "dataset": "digits", "quantization": mode, "pretrained": False}
    return parse_trial({**values, **fields})


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("vit_small_patch14_dinov2", 48),
        ("vit_base_patch16_224", 48),
        ("deit3_small_patch16_224", 48),
        ("vit_small_patch16_dinov3", 48),
        (SWIN, 48),
        ("pit_ti_224", 48),
    ],
)
def test_the_default_targets_are_all_block_layers_and_all_are_called(model, layers):
    skeleton = skeleton_of(model, 10, None)
    _, names = adapted(skeleton, DEFAULT, model)
    assert len(names) == layers
    assert set(names) == set(block_linears(skeleton))
    assert set(names) <= called_linears(model, None)
    for mode in ("none", "nf4"):
        refuse_without_effect(skeleton, trial(model, mode))


@pytest.mark.parametrize(
    "model", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"]
)
def test_layers_that_a_model_never_calls_are_refused_with_the_remedy(model):
    skeleton = skeleton_of(model, 10, None)
    with pytest.raises(UserError, match=r"an adapter on .*attn\.qkv would have no effect") as found:
        refuse_without_effect(skeleton, trial(model))
    remedy = str(found.value).partition("lora.target_modules=")[2].partition("'")[0]
    others = {"lora": {"target_modules": remedy}}
    refuse_without_effect(skeleton, trial(model, **others))
    names = adapted(skeleton, remedy, model)[1]
    assert names
    assert not any("qkv" in name for name in names)
    with pytest.raises(UserError, match=r"attn\.qkv cannot be quantized") as found:
        refuse_without_effect(skeleton, trial(model, "nf4", **others))
    assert 'skip_layers=["*.attn.qkv"]\'' in str(found.value)
    skipped = {"mode": "nf4", "skip_layers": ["*.attn.qkv"]}
    refuse_without_effect(skeleton, trial(model, skipped, **others))


def test_what_is_called_is_seen_and_looking_leaves_no_trace():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 10)
            self.pretrained_cfg = {"input_size": (3, 4, 4)}

        def forward(self, x):
            x = torch.nn.functional.linear(x.mean(1), self.read.weight)
            return self.called(x).mean(1)

    @timm.models.register_model
    def reads_a_weight(**kwargs):
        return Reads()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert called_linears("reads_a_weight", None) == {"called"}
    assert torch.equal(state, torch.get_rng_state())


def test_patterns_are_held_against_whole_names_then_from_blocks_on():
    plain, staged = skeleton_of("deit_tiny_patch16_224", 10, None), skeleton_of(SWIN, 10, None)
    pattern, names = adapted(plain, DEFAULT, "m")
    assert pattern == DEFAULT  # as before: PEFT's own file of the adapter stays the same
    assert len(names) == 48
    assert len(adapted(staged, DEFAULT, SWIN)[1]) == 48
    one = adapted(staged, r"layers\.2\.blocks\.0\.attn\.qkv", SWIN)
    assert one[1] == ["layers.2.blocks.0.attn.qkv"]
    # Anchored at both ends: neither a part of a name nor the patch merging between the stages.
    for wrong in (r"attn\.qkv", r"\d+\.attn\.qkv", "reduction", "qkv"):
        with pytest.raises(UserError, match="no linear layer of"):
            adapted(staged, wrong, SWIN)


@pytest.mark.parametrize(
    ("targets", "layers", "over"),
    [
        (r"blocks\..*", 48, ["blocks.0.norm1", "blocks.0.attn.attn_drop", "blocks.0.mlp.act"]),
        (r".*", 48, ["patch_embed.proj", "pos_drop", "norm", "head"]),
        (r".*proj", 12, ["patch_embed.proj"]),
        (r"(blocks\.0\.attn\.qkv|head)", 1, ["head"]),
        (r"blocks\.0", 4, []),
        (r"blocks\.\d+\.attn", 24, []),
        (r"blocks\.\d+\.(attn|drop_path1)", 24, ["blocks.0.drop_path1"]),
        ("blocks", 48, []),
        (DEFAULT, 48, []),
    ],
)
def test_a_pattern_adapts_the_linear_layers_that_it_can_mean(targets, layers, over):
    skeleton = skeleton_of("deit_tiny_patch16_224", 10, None)
    pattern, names = adapted(skeleton, targets, "m")
    assert len(names) == layers
    assert all(name.startswith("blocks.") for name in names)
    modules = [name for name, _ in skeleton.named_modules()]
    assert [name for name in modules if re.fullmatch(pattern, name)] == names  # as PEFT reads it
    found = passed_over(skeleton, targets)
    assert set(over) <= set(found)
    assert bool(over) == bool(found)
    assert not set(found) & set(names)


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        ("head", "matches head alone, the head, which is trained whole anyway"),
        (r"patch_embed\.proj", r"matches patch_embed\.proj, a Conv2d, and no linear layer"),
        ("patch_embed", "a PatchEmbed, and no linear layer"),
        (r"blocks\.0\.mlp\.drop1", "a Dropout, and no linear layer"),
        ("", "no linear layer of m has such a name"),
    ],
)
def test_a_pattern_that_means_no_linear_layer_is_one_sentence(targets, why):
    with pytest.raises(UserError, match=f"{why}.*choose") as refused:
        adapted(skeleton_of("deit_tiny_patch16_224", 10, None), targets, "m")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("targets", [r"blocks\..*", ".*", r"blocks\.0"])
def test_such_a_pattern_is_built(tiny, targets):
    built = build_model(tiny("nf4", lora={"r": 2, "target_modules": targets}), 10)
    adapters = [name for name, _ in built.model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapters) == (4 if targets == r"blocks\.0" else 24)
    assert not any("head" in name for name in adapters)


def test_blocks_are_told_with_their_stage():
    assert block_ranges([]) == "none"
    assert block_ranges(f"blocks.{i}.attn.qkv" for i in (0, 2, 3, 4)) == "0,2-4"
    assert block_ranges(block_linears(skeleton_of(SWIN, 10, None))) == "0/0-1,1/0-1,2/0-5,3/0-1"
    assert block_ranges(f"blocks.{i}.mlp.fc1" for i in range(12)) == "0-11"


def kernel_is_right(mode, width):
    try:
        return check_kernel(mode, width, "cpu") > 0
    except UserError:
        return False


@pytest.mark.parametrize("mode", ["none", "nf4"])
def test_swin_is_built_as_predicted_where_the_kernel_is_right(mode):
    """bitsandbytes' 4-bit kernel for AVX512 returns wrong weights of 96 columns."""
    config = trial(SWIN, mode, lora={"r": 2})
    skeleton = skeleton_of(SWIN, 10, None)
    linears = block_linears(skeleton)
    modes = plan_layers(skeleton, config.quantization)
    widths = {linears[name].in_features for name in modes}
    if not all(kernel_is_right(mode, width) for width in widths):
        with pytest.raises(UserError, match="96 columns"):
            build_model(config, 10)
        pytest.skip("this CPU's 4-bit kernel is wrong for 96 columns: refused, as it should be")
    built = build_model(config, 10)
    assert len(built.layers) == (48 if mode == "nf4" else 0)
    assert built.quantized_blocks == ("0/0-1,1/0-1,2/0-5,3/0-1" if mode == "nf4" else "none")
    # Indices of 8 bytes among the buffers (relative positions) are counted as they are.
    assert built.weights_bytes == predict(config, 10, torch.device("cpu")).weights_bytes
    if mode == "none":
        assert built.bytes_fp32 == built.weights_bytes
        integers = [b for b in skeleton.buffers() if not b.is_floating_point()]
        assert bytes_at(integers, 2) == bytes_at(integers, 4) > 100_000
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    scores = built.model.eval()(images)  # in training, Swin drops whole blocks at random
    scores.sum().backward()
    adapters = [p for n, p in built.model.named_parameters() if "lora_B" in n]
    assert len(adapters) == 48
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
