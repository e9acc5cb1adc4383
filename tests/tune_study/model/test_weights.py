from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from tune_study.errors import UserError
from tune_study.model.weights import (
    Fit,
    _prove_loaded,
    classifier_names,
    listed,
    load_base,
    load_fitted,
    refuse_misfit,
    weights_file,
)


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


def test_hub_weights_load_from_the_cached_file(tiny, weights, monkeypatch):
    import huggingface_hub

    path, state = weights
    asked = []

    def cached(repo, file, *, revision, local_files_only=False):
        asked.append((repo, file))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    # The stand-in for the hub's file has 7 classes where timm expects 1000: the head is dropped.
    base = load_base(tiny("none", model="deit_tiny_patch16_224"), 10)
    assert asked == [("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")]
    assert torch.equal(
        base.state_dict()["blocks.2.mlp.fc2.weight"], state["blocks.2.mlp.fc2.weight"]
    )


def test_a_folder_is_searched_in_the_order_of_its_suffixes(tmp_path):
    for suffix in ("bin", "pt", "pth", "safetensors"):
        (tmp_path / f"m.{suffix}").touch()
        assert weights_file("m", tmp_path).suffix == f".{suffix}"
    assert weights_file("other", tmp_path / "m.pt") == tmp_path / "m.pt"
    with pytest.raises(UserError, match=r"no n\.safetensors in it"):
        weights_file("n", tmp_path)
    with pytest.raises(UserError, match="there is no such file or folder"):
        weights_file("m", tmp_path / "none")


class Small(torch.nn.Module):
    def __init__(self, cfg=None):
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
        self.pretrained_cfg = cfg or {}


def test_every_tensor_but_the_heads_is_the_files(tmp_path):
    model = Small()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    without_head = {name: t.half() for name, t in state.items() if "body" in name}
    with torch.no_grad():
        model.body.weight.copy_(without_head["body.weight"])
        model.body.bias.copy_(without_head["body.bias"])
    assert _prove_loaded(model, {**without_head, "more": torch.zeros(1)}, "--weights w") == []
    gap = {"body.weight": without_head["body.weight"]}
    with pytest.raises(UserError, match=r"--weights w: .*1 of its 2 .* the first is body\.bias"):
        _prove_loaded(model, gap, "--weights w")
    assert _prove_loaded(model, gap, "hub", whole=False) == ["body.bias"]
    with pytest.raises(UserError, match="2 of its 2 tensors"):
        _prove_loaded(model, {}, "hub", whole=False)
    other = without_head["body.weight"].clone()
    other[2, 1] += 1
    with pytest.raises(UserError, match=r"body\.weight of the model is not what the file holds"):
        _prove_loaded(model, {**without_head, "body.weight": other}, "--weights w")


def test_the_head_is_what_timm_calls_the_classifier():
    assert classifier_names(Small()) == ["head"]
    assert classifier_names(Small({"classifier": "fc"})) == ["fc"]
    assert classifier_names(Small({"classifier": ("head", "head_dist")})) == ["head", "head_dist"]


@pytest.fixture
def more(weights, tmp_path):
    """(file, its tensors) of a network with LayerScale and a register, of DeiT-tiny's sizes."""
    _, state = weights
    state = {**state, "reg_token": torch.ones(1, 1, 192)}
    state |= {f"blocks.{n}.ls{k}.gamma": torch.ones(192) for n in range(12) for k in (1, 2)}
    path = tmp_path / "more.safetensors"
    save_file(state, path)
    return path, state


def test_tensors_without_a_place_in_the_model_are_refused_with_their_names(tiny, more):
    path, _ = more
    config = tiny("none", model="deit_tiny_patch16_224")
    _, fit = load_fitted(config, 10, path)
    assert len(fit.left_out) == 25
    assert not fit.resampled + fit.missing
    with pytest.raises(UserError) as refused:
        refuse_misfit(fit, config.model, path)
    said = str(refused.value)
    assert "25 tensors (" in said
    assert "reg_token" in said
    assert "blocks.*.ls1.gamma, blocks.*.ls2.gamma" in said
    assert "--adapt-weights" in said
    refuse_misfit(Fit(), config.model, path)


def test_a_patch_of_another_size_is_resampled_by_timm_and_refused_by_us(tiny, weights, tmp_path):
    _, state = weights
    path = tmp_path / "p14.safetensors"
    save_file({**state, "patch_embed.proj.weight": torch.randn(192, 3, 14, 14)}, path)
    config = tiny("none", model="deit_tiny_patch16_224")
    model, fit = load_fitted(config, 10, path)
    assert fit == Fit(resampled=("patch_embed.proj.weight",))
    assert model.patch_embed.proj.weight.shape[-2:] == (16, 16)
    with pytest.raises(UserError, match=r"1 tensor \(patch_embed\.proj\.weight\) at another size"):
        refuse_misfit(fit, config.model, path)


def test_positions_are_resampled_without_a_word_only_for_an_image_size_that_was_asked_for(
    tiny, weights, tmp_path
):
    _, state = weights
    path = tmp_path / "384.safetensors"
    save_file({**state, "pos_embed": torch.randn(1, 577, 192)}, path)
    config = tiny("none", model="deit_tiny_patch16_224")
    assert load_fitted(config, 10, path)[1] == Fit(resampled=("pos_embed",))
    config = tiny("none", model="deit_tiny_patch16_224", data={"image_size": 112})
    assert load_fitted(config, 10, path)[1] == Fit()


def test_what_timm_itself_leaves_out_of_its_pretraining_is_no_misfit(tiny, tmp_path):
    """DINOv2's files hold a mask token; its registers are a part of another network."""
    torch.manual_seed(5)
    state = timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0).state_dict()
    state["mask_token"] = torch.zeros(1, 384)
    path = tmp_path / "dino.safetensors"
    save_file(state, path)
    config = tiny("none", model="vit_small_patch14_dinov2", data={"image_size": 56})
    assert load_fitted(config, 10, path)[1] == Fit()
    save_file({**state, "register_tokens": torch.zeros(1, 4, 384)}, path)
    with pytest.raises(UserError, match=r"--weights .* do not fit the model"):
        load_fitted(config, 10, path)


def test_a_checkpoint_without_tensors_is_refused(tiny, tmp_path):
    config = tiny("none", model="deit_tiny_patch16_224")
    for content in ([1, 2], {"state_dict": 3}, {"epoch": 1}, torch.zeros(2)):
        path = tmp_path / "odd.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_base(config, 10, path)


def test_a_pointer_or_a_page_in_place_of_weights_is_named(tiny, tmp_path):
    config = tiny("none", model="deit_tiny_patch16_224")
    path = tmp_path / "w.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_base(config, 10, path)
    path.write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(UserError, match="a web page and not weights"):
        load_base(config, 10, path)


def test_kinds_of_tensors_are_listed_once():
    names = [f"blocks.{n}.{kind}" for kind in "abcdefgh" for n in range(3)]
    assert listed(names, most=2) == "24 tensors (blocks.*.a, blocks.*.b, and 6 more kinds)"
    assert listed(["x"]) == "1 tensor (x)"


def test_a_function_that_passes_over_the_weights_is_refused(tiny):
    """Of the user's own, with a file in its default_cfgs: nothing else would tell."""
    shipped = timm.get_pretrained_cfg("vit_glyphs_patch4_32")
    model = timm.create_model("vit_glyphs_patch4_32")

    @timm.models.register_model
    def passes_over(pretrained=False, **options):
        return model

    weights = Path(shipped.file)
    with pytest.raises(UserError, match="passes_over loads no weights when it is asked for"):
        load_base(tiny("none", model="passes_over"), 10, weights)
