import hashlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from search_spaces.own_code import Code
from tests.tune_study.data.pictures import class_folders
from tune_study.data.splits import UNKNOWN
from tune_study.errors import UserError
from tune_study.memory.estimate import estimate
from tune_study.study import preflight
from tune_study.study.console import say_what_was_adapted
from tune_study.trial.context import RunContext

CIFAR_SIZES = {"train_size": 300, "val_size": 500, "test_size": 200}


def context(tmp_path, **fields):
    return RunContext(study_dir=tmp_path / "study", **fields)


def test_preflight_finds_the_inputs_and_their_checksums(tiny, tmp_path):
    trials = [tiny("none"), tiny("nf4")]
    checked = preflight.check(trials, context(tmp_path))
    shipped = Path(timm.get_pretrained_cfg("vit_glyphs_patch4_32").file)
    entry = checked.checksums["weights"]["vit_glyphs_patch4_32"]
    assert entry["sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert len(checked.checksums["data"]["digits"]["sha256"]) == 64
    assert checked.data[trials[0].trial_id] is checked.data[trials[1].trial_id]
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "vit_nothing"}, "timm has no such model"),
        ({"dataset": "cifar10"}, "--data-dir"),
        ({"data": {"train_size": 10**6}}, "data.train_size"),
        ({"data": {"image_size": 33}}, "multiple"),
        ({"quantization": {"mode": "nf4", "skip_layers": ["x"]}}, "matches no layer"),
        ({"training": {"step": "graph"}}, "--device cpu has no CUDA graphs"),
        ({"dataset": "code:leaves"}, "dataset code:leaves: it means a function of the grid's own"),
        ({"data": {"augment": "code:mine"}}, "data.augment = code:mine: it means a function"),
    ],
)
def test_preflight_refuses_before_anything_is_written(tiny, tmp_path, fields, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        preflight.check([tiny("nf4", **fields)], context(tmp_path, data_dir=tmp_path / "empty"))
    assert not (tmp_path / "study").exists()


def test_a_model_of_ones_own_says_where_its_weights_come_from(tiny, tmp_path):
    """Its function may pass over ``pretrained``; timm looks at nothing."""

    @timm.models.register_model
    def without_weights(pretrained=False, **options):
        known = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
        rest = {name: value for name, value in options.items() if name not in known}
        return timm.create_model("vit_glyphs_patch4_32", **rest)

    code = Code("mine.py", "grid", "", "sha", ("without_weights",))
    trial, where = tiny("none", model="without_weights"), context(tmp_path, code=code)
    with pytest.raises(UserError, match=r"model = without_weights: mine\.py names no pretrained"):
        preflight.check([trial], where)
    random = tiny("none", model="without_weights", pretrained=False)
    checked = preflight.check([random], where)
    assert checked.checksums["weights"]["without_weights"]["pretrained"] is False


def test_a_transform_of_ones_own_is_tried_before_a_trial(tiny, tmp_path):
    text = "def mine(images, generator):\n    assert len(images) == 2\n    return images / 255\n"
    where = context(tmp_path, code=Code("m.py", "grid", text, "sha of a transform"))
    trial = tiny("none", data={"augment": "code:mine"})
    with pytest.raises(UserError, match=r"data\.augment = code:mine: it made values from 0 to 1;"):
        preflight.check([trial], where)
    sizes = dict.fromkeys(("train_size", "val_size", "test_size"))
    folder = class_folders(tmp_path / "d", cat=10, dog=10)  # no image of it is loaded
    other = tiny("none", dataset=f"folder:{folder}", data={**sizes, "augment": "code:other"})
    with pytest.raises(UserError, match=r"code:other: m\.py has no function other"):
        preflight.check([other], where, dry=True)


def test_images_of_code_are_drawn_by_the_first_start_and_not_by_a_dry_run(tiny, tmp_path):
    text = (
        "import numpy as np\n"
        "def leaves(split):\n"
        "    rows = {'train': 30, 'val': 10, 'test': 0}[split]\n"
        "    return ((np.full((40, 40), at, np.uint8), at % 2) for at in range(rows))\n"
    )
    code = Code("m.py", "grid", text, hashlib.sha256(text.encode()).hexdigest())
    where = context(tmp_path, code=code, cache_dir=tmp_path / "cache")
    trial = tiny(
        "none",
        dataset="code:leaves",
        data={"train_size": None, "val_size": None, "test_size": None},
    )
    dry = preflight.check([trial], where, dry=True)
    assert (dry.not_here["images"], dry.checksums["data"]) == (["code:leaves"], {})
    assert dry.data[trial.trial_id] is UNKNOWN
    checked = preflight.check([trial], where)
    entry = checked.checksums["data"]["code:leaves"]
    assert len(entry["sha256"]) == 64
    assert (
        entry["images"]
        == checked.told[0]
        == (
            "code:leaves: 40 images of 2 classes; 24 to train on, 10 for validation, 6 for the "
            "test (split off train); drawn by leaves in m.py"
        )
    )
    again = preflight.check([trial], where, dry=True)
    assert again.not_here["images"] == []
    assert again.data[trial.trial_id] == checked.data[trial.trial_id]
    assert trial.trial_id.startswith("vit_glyphs_patch4_32-code_leaves-r4-none-s42-")


def test_a_model_that_does_not_take_its_images_is_refused(tiny, tmp_path):
    @timm.models.register_model
    def never_runs(**options):
        class Never(timm.models.vision_transformer.VisionTransformer):
            def forward(self, x):
                raise KeyError("planted")

        model = Never(img_size=32, embed_dim=64, depth=1, num_heads=1)
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model

    with pytest.raises(UserError, match=r"does not take images of 32 x 32 px \('planted'\)"):
        preflight.check([tiny("none", model="never_runs", pretrained=False)], context(tmp_path))


def test_the_checksum_of_weights_says_where_they_come_from(tiny, tmp_path, monkeypatch):
    given = tmp_path / "mine.safetensors"
    given.write_bytes(b"weights")
    where = context(tmp_path, weights=given)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    told = {"pretrained": True, "file": "mine.safetensors", "sha256": sha256}
    assert preflight._weights_sha256(tiny("none"), where) == told
    monkeypatch.setattr(preflight, "pretrained_file", lambda model: given)
    assert preflight._weights_sha256(tiny("none"), context(tmp_path)) == told
    assert preflight._weights_sha256(tiny("none", pretrained=False), where) == {
        "pretrained": False,
        "sha256": None,
    }


def test_each_model_is_built_once_however_many_seeds_there_are(tiny, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(
        preflight,
        "build_model",
        lambda trial, classes, weights, device: built.append((trial, classes, weights, device)),
    )
    weights = tmp_path / "w"
    trials = [tiny(mode, seed=seed) for mode in ("none", "nf4") for seed in (1, 2)]
    trials += [tiny("none", lora={"r": 3}), tiny("none", data={"image_size": 64})]
    images = SimpleNamespace(classes=3)
    checked = preflight.Checked(dict.fromkeys([t.trial_id for t in trials], images), {})
    preflight.validate(trials, checked, context(tmp_path, weights=weights))
    assert built == [(trials[n], 3, weights, "cpu") for n in (0, 2, 4, 5)]


def test_weights_that_the_model_does_not_take_need_a_word_and_are_recorded(tiny, tmp_path):
    shipped = Path(timm.get_pretrained_cfg("vit_glyphs_patch4_32").file)
    more = {**load_file(shipped), "blocks.0.ls1.gamma": torch.ones(192)}
    save_file(more, tmp_path / "w.safetensors")
    where = context(tmp_path, weights=tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"blocks\.\*\.ls1\.gamma\) of the file"):
        preflight.check([tiny("none")], where)
    checked = preflight.check([tiny("none")], where, adapt_weights=True)
    entry = checked.checksums["weights"]["vit_glyphs_patch4_32"]
    assert entry["left_out"] == ["blocks.0.ls1.gamma"]
    assert "resampled" not in entry
    size = more["patch_embed.proj.weight"].shape[:2]
    more["patch_embed.proj.weight"] = torch.randn(*size, 8, 8)
    save_file(more, tmp_path / "w.safetensors")
    other = tiny("none", data={"image_size": 64})
    both = preflight.check([tiny("none"), other], where, adapt_weights=True)
    entry = both.checksums["weights"]["vit_glyphs_patch4_32"]
    assert entry["left_out"] == ["blocks.0.ls1.gamma"]
    assert "patch_embed.proj.weight" in entry["resampled"]
    console = Console(file=io.StringIO(), width=200)
    say_what_was_adapted(console, checked)
    assert "left out: 1 tensor (blocks.*.ls1.gamma)" in console.file.getvalue()


def test_a_dry_look_downloads_nothing_and_says_what_it_left_out(tiny, tmp_path, monkeypatch):
    def refuse(*given, **more):
        raise AssertionError("a dry look asks no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(preflight, "load_fitted", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    where = context(tmp_path, cache_dir=tmp_path / "none")
    trial = tiny("nf4", model="deit_tiny_patch16_224", dataset="cifar100", data=CIFAR_SIZES)
    checked = preflight.check([trial], where, dry=True)
    assert checked.data[trial.trial_id][:4] == (100, 300, 500, 200)
    assert checked.not_here == {"images": ["cifar100"], "weights": ["deit_tiny_patch16_224"]}
    assert checked.checksums == {"data": {}, "weights": {}}
    assert not list(tmp_path.iterdir())


def test_a_dry_look_checks_what_is_here(tiny, tmp_path, monkeypatch):
    where = context(tmp_path)
    assert preflight.check([tiny("nf4")], where, dry=True) == preflight.check([tiny("nf4")], where)
    given = tmp_path / "mine.safetensors"
    given.write_bytes(b"no weights")
    with pytest.raises(UserError, match="--weights"):
        preflight.check([tiny("nf4")], context(tmp_path, weights=given), dry=True)
    cifar = tiny("nf4", dataset="cifar10")
    with pytest.raises(UserError, match="no cifar10 in it"):
        preflight.check([cifar], context(tmp_path, data_dir=tmp_path), dry=True)


def test_what_was_found_in_a_folder_is_told_and_kept(tiny, tmp_path):
    root = class_folders(tmp_path / "d", a=10, b=10)
    (root / "a" / "000.png").write_bytes(b"")
    sizes = {"train_size": 8, "val_size": 2, "test_size": 2}
    trials = [tiny(mode, dataset=f"folder:{root}", data=sizes) for mode in ("none", "nf4")]
    where = context(tmp_path, cache_dir=tmp_path / "cache", leave_out_broken=True)
    checked = preflight.check(trials, where)
    (told,) = checked.told
    assert told.startswith(f"folder:{root}: 20 images of 2 classes; 8 to train on, 2 for")
    kept = checked.checksums["data"][f"folder:{root}"]
    assert kept["images"] == told
    assert kept["left_out"] == ["a/000.png (it is no image)"]
    assert len(kept["sha256"]) == 64
    dry = preflight.check(trials, where, dry=True)
    assert (dry.told, dry.checksums["data"], dry.not_here["images"]) == ([told], {}, [])


def test_a_dry_look_plans_for_a_data_set_that_is_not_here(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")
    where = context(tmp_path, cache_dir=tmp_path / "cache")
    trial = tiny("nf4", dataset="hf:nobody/nothing")
    checked = preflight.check([trial], where, dry=True)
    assert checked.data[trial.trial_id] == UNKNOWN
    assert checked.not_here["images"] == ["hf:nobody/nothing"]
    assert checked.told == []
    expected = estimate(trial, UNKNOWN, torch.device("cpu"))
    assert math.isnan(expected.train_time_s)
    assert expected.weights_bytes > 0
    assert not (tmp_path / "cache").exists()
