import io
import json
import re
import urllib.error
import urllib.request
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from tune_study.config import parse_trial
from tune_study.errors import UserError
from tune_study.model.hub import refuse_unknown_model, repository
from tune_study.model.layers import skeleton_of
from tune_study.model.weights import Fit, load_base, load_fitted, weights_are_here

ANSWER = SimpleNamespace(headers={}, request=None, status_code=403)


class ReadTimeout(errors.HTTPError):
    """As the hub's HTTP library has it: no OSError."""


DEIT = "deit_tiny_patch16_224"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""

    def refuse(*given, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache, repo, name):
    """Where the hub's cache would have the file ``name`` of ``repo``."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("x")
    (folder / "snapshots" / "x").mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / "x" / name


def sentence(config):
    with pytest.raises(UserError) as refused:
        load_base(config, 10)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_network_names_the_remedy(tiny, cache):
    said = sentence(tiny("none", model=DEIT))
    assert "could not be downloaded (URLError)" in said
    assert "--weights" in said
    assert "pretrained=false" in said
    assert not weights_are_here(DEIT)


def test_offline_is_said_without_looking_for_a_network(tiny, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for model in (DEIT, "vit_tiny_patch16_224.augreg_in21k"):  # the second from .npz once
        assert "HF_HUB_OFFLINE is set" in sentence(tiny("none", model=model))


def test_a_cache_that_cannot_be_written_is_named(tiny, cache, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *given, **options: io.BytesIO())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/dev/null/hub")

    def download(*given, local_files_only=False, **options):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        raise NotADirectoryError(20, "Not a directory: '/dev/null/hub'")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "set HF_HOME" in sentence(tiny("none", model=DEIT))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: ReadTimeout("slow"), r"could not be downloaded \(ReadTimeout\)"),
        (lambda: errors.LocalEntryNotFoundError("no network"), "could not be downloaded"),
        (lambda: errors.RemoteEntryNotFoundError("no", response=ANSWER), r"has no model\.saf.* or"),
        (lambda: errors.GatedRepoError("no", response=ANSWER), r"does not give .*GatedRepoError"),
        (lambda: ValueError("unknown url type"), "does not give"),
    ],
)
def test_what_a_download_dies_of_is_one_sentence(tiny, cache, monkeypatch, error, words):
    def download(*given, local_files_only=False, **options):
        raise errors.LocalEntryNotFoundError("not there") if local_files_only else error()

    monkeypatch.setattr(urllib.request, "urlopen", lambda *given, **options: io.BytesIO())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    said = sentence(tiny("none", model=DEIT))
    assert re.search(words, said)
    assert "--weights" in said


@pytest.mark.parametrize("damage", ["text", "cut", "pointer", "page", "empty"])
def test_a_broken_file_of_the_cache_is_named_with_its_remedy(tiny, cache, damage):
    path = cached(cache, "timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")
    if damage == "cut":
        save_file(timm.create_model(DEIT).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.write_text(
            {
                "text": "bad",
                "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:1",
                "page": "<html>Sign in</html>",
                "empty": "",
            }[damage]
        )
    said = sentence(tiny("none", model=DEIT))
    assert f"rm {path}" in said
    assert "downloaded anew" in said


def test_a_cached_file_is_proven_to_be_in_the_model(tiny, cache):
    path = cached(cache, "timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")
    state = timm.create_model(DEIT).state_dict()
    del state["blocks.3.norm1.bias"]
    save_file({**state, "blocks.0.ls1.gamma": torch.ones(192)}, path)
    model, fit = load_fitted(tiny("none", model=DEIT), 10)
    assert fit == Fit(left_out=("blocks.0.ls1.gamma",), missing=("blocks.3.norm1.bias",))
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])
    assert weights_are_here(DEIT)


def test_a_model_of_someone_on_the_hub_is_built_as_its_config_says(tiny, cache):
    name = "hf-hub:someone/my-vit"
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {"depth": 2}}
    config["pretrained_cfg"] = {"num_classes": 3, "classifier": "head", "input_size": [3, 224, 224]}
    cached(cache, "someone/my-vit", "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    state = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3).state_dict()
    save_file(state, cached(cache, "someone/my-vit", "model.safetensors"))
    refuse_unknown_model(name)
    model, fit = load_fitted(tiny("none", model=name), 10)
    assert fit == Fit()
    assert len(model.blocks) == len(skeleton_of(name, 10, None).blocks) == 2
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])
    assert torch.equal(
        model.state_dict()["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"]
    )


def test_a_config_that_timm_cannot_use_is_refused(cache):
    path = cached(cache, "someone/other", "config.json")
    for content in ('{"architectures": ["BertModel"]}', "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match="names no architecture of timm's"):
            refuse_unknown_model("hf-hub:someone/other")
    path.write_text("{")
    with pytest.raises(UserError, match="not whole"):
        refuse_unknown_model("hf-hub:someone/other")


def test_an_unknown_or_old_name_is_answered_with_the_one_to_take():
    refuse_unknown_model(DEIT)
    for name, near in (
        ("deit_tiny", "timm has no such model; try deit_tiny_distilled_patch16_224$"),
        ("zzz", "timm has no such model; try deit_tiny_patch16_224$"),
        ("vit_tiny_patch16_224_in21k", "calls it vit_tiny_patch16_224.augreg_in21k by now"),
        ("some/vit", "write hf-hub:some/vit"),
        ("local-dir:/some/vit", "the folder with --weights"),
    ):
        with pytest.raises(UserError, match=near):
            refuse_unknown_model(name)


def test_a_model_has_one_name():
    def named(model):
        return parse_trial({"model": model, "dataset": "digits"})

    plain = named("vit_tiny_patch16_224.augreg_in21k")
    for prefix in ("timm/", "hf-hub:timm/", "hf_hub:timm/", "https://huggingface.co/timm/"):
        other = named(f"{prefix}vit_tiny_patch16_224.augreg_in21k")
        assert other == plain
        assert other.trial_id == plain.trial_id
    assert named("https://hf.co/o/m/").model == named("hf-hub:o/m").model == "hf-hub:o/m"
    assert named("hf-hub:timm/m@v2").model == "hf-hub:timm/m@v2"
    assert named("o/m").model == "o/m"
    assert repository("hf-hub:o/m@v2") == "o/m@v2"
