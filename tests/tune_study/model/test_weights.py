import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from tune_study.errors import UserError
from tune_study.model.weights import (
    _prove_loaded,
    classifier_names,
    load_base,
    refuse_unknown_model,
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


def test_a_folder_is_searched_in_the_order_of_its_suffixes(tmp_path):
    for suffix in ("bin", "pt", "pth", "safetensors"):
        (tmp_path / f"m.{suffix}").touch()
        assert weights_file("m", tmp_path).suffix == f".{suffix}"
    assert weights_file("other", tmp_path / "m.pt") == tmp_path / "m.pt"
    with pytest.raises(UserError, match=r"no n\.safetensors in it"):
        weights_file("n", tmp_path)
    with pytest.raises(UserError, match="there is no such file or folder"):
        weights_file("m", tmp_path / "none")


def test_an_unknown_model_is_answered_with_a_near_one():
    refuse_unknown_model("deit_tiny_patch16_224")
    for name, near in (
        ("deit_tiny", "deit_tiny_distilled_patch16_224"),
        ("zzz", "deit_tiny_patch16_224"),
    ):
        with pytest.raises(UserError, match=f"timm has no such model; try {near}$"):
            refuse_unknown_model(name)


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
    _prove_loaded(model, {**without_head, "more": torch.zeros(1)}, tmp_path)
    with pytest.raises(UserError, match=r"1 of its 2 tensors .* the first is body\.bias"):
        _prove_loaded(model, {"body.weight": without_head["body.weight"]}, tmp_path)
    other = without_head["body.weight"].clone()
    other[2, 1] += 1
    with pytest.raises(UserError, match=r"body\.weight of the model is not what the file holds"):
        _prove_loaded(model, {**without_head, "body.weight": other}, tmp_path)
    _prove_loaded(model, {**without_head, "body.weight": torch.zeros(4, 2)}, tmp_path)  # resampled


def test_the_head_is_what_timm_calls_the_classifier():
    assert classifier_names(Small()) == ["head"]
    assert classifier_names(Small({"classifier": "fc"})) == ["fc"]
    assert classifier_names(Small({"classifier": ("head", "head_dist")})) == ["head", "head_dist"]
