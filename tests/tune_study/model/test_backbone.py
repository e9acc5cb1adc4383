"""The shipped backbone: it loads offline, it has learned something, and it survives nf4.

The bounds are stated beside what was measured when the weights were made; they leave room for
other library versions and other CPUs, and none holds for weights that were not loaded.
"""

import importlib
import json
import re
import socket
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from examples.backbone import pretrain
from examples.backbone.glyphs import make_glyphs, render
from examples.backbone.probe import (
    extract_features,
    feature_cosine,
    load_digits_images,
    nf4_twin,
    probe_accuracies,
)
from tune_study.model import backbone

FEW_DIGITS = 600
README = backbone.WEIGHTS_FILE.with_name("README.md")


@pytest.fixture(scope="module")
def record():
    return json.loads(backbone.RECORD_FILE.read_text())


@pytest.fixture(scope="module")
def model():
    return timm.create_model(backbone.MODEL_NAME, pretrained=True, num_classes=10, img_size=32)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits_images()
    return images[:FEW_DIGITS], labels[:FEW_DIGITS]


@pytest.fixture(scope="module")
def features(model, digits):
    return extract_features(model, digits[0])


def test_loads_without_a_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something asked for the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = timm.create_model(backbone.MODEL_NAME, pretrained=True, num_classes=10, img_size=32)
    assert loaded.head.out_features == 10


def test_parameters_are_those_of_the_file(model, record):
    assert backbone.WEIGHTS_FILE.stat().st_size <= 6_000_000
    assert backbone.WEIGHTS_FILE.stat().st_size == record["file_bytes"]
    tensors = load_file(backbone.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    parameters = dict(model.named_parameters())
    assert tensors.keys() == parameters.keys()
    for name in tensors.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(parameters[name], tensors[name].float()), name


def test_it_is_an_ordinary_timm_vit(model, record):
    linears = {n for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert linears == {f"{i}.{kind}" for i in range(len(model.blocks)) for kind in kinds}
    for name in linears:
        layer = model.blocks.get_submodule(name)
        assert layer.in_features % 64 == 0
        assert layer.out_features % 64 == 0
    assert model.cls_token is not None
    assert model.patch_embed.proj.in_channels == 3
    configuration = timm.data.resolve_model_data_config(model)
    assert configuration["input_size"] == (3, 32, 32)
    assert configuration["mean"] == configuration["std"] == (0.5, 0.5, 0.5)
    with_glyph_head = timm.create_model(backbone.MODEL_NAME)
    assert sum(p.numel() for p in with_glyph_head.parameters()) == record["parameters"]


def test_another_image_size_resamples_the_position_embedding(model):
    larger = timm.create_model(backbone.MODEL_NAME, pretrained=True, num_classes=2, img_size=48)
    assert larger.pos_embed.shape == (1, 1 + 12 * 12, 128)
    assert torch.equal(larger.cls_token, model.cls_token)


def test_importing_twice_is_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(backbone)
    assert timm.is_model(backbone.MODEL_NAME)
    assert backbone.MODEL_NAME in timm.list_models(pretrained=True)


def test_rendering_is_deterministic_and_bounded():
    labels = torch.arange(20)
    draw = [
        render(make_glyphs(20, 7), labels, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draw[0].shape == (20, 3, 32, 32)
    assert draw[0].dtype == torch.float32
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert draw[0].min() >= -1
    assert draw[0].max() <= 1
    assert not torch.equal(make_glyphs(20, 7).control, make_glyphs(20, 8).control)


def test_every_class_is_drawn_and_differs_from_every_other():
    glyphs = make_glyphs(backbone.NUM_GLYPHS, 0)
    labels = torch.arange(backbone.NUM_GLYPHS)
    bare = render(glyphs, labels, torch.Generator().manual_seed(0), strength=0.0)
    flat = bare[:, 0].flatten(1)
    # Undistorted glyphs are light on black; the pen's width is all that still varies.
    assert ((flat > 0).sum(1) >= 6).all()  # measured: 8 pixels or more are mostly ink
    apart = torch.cdist(flat, flat) + 1e3 * torch.eye(len(flat))
    assert apart.min() > 4  # measured: 5.49


def test_loops_are_closed_and_strokes_end_where_they_should():
    from examples.backbone.glyphs import CORNERS, CURVE, LOOP, _bases

    bases = _bases()
    assert torch.allclose(bases.sum(-1), torch.ones(bases.shape[:2]), atol=1e-5)
    assert torch.allclose(bases[LOOP, 0], bases[LOOP, -1], atol=1e-5)
    for kind in (CORNERS, CURVE):
        assert torch.allclose(bases[kind, [0, -1]], torch.eye(4)[[0, 3]], atol=1e-5)


def test_pretraining_beats_random_initialisation_on_digits(features, digits):
    images, labels = digits
    torch.manual_seed(0)
    untrained = extract_features(timm.create_model(backbone.MODEL_NAME), images)
    pretrained_accuracy = np.mean(probe_accuracies(features, labels, 100, (0, 1)))
    untrained_accuracy = np.mean(probe_accuracies(untrained, labels, 100, (0, 1)))
    # Measured: 0.923 against 0.493 (0.487 to 0.547 over three initialisations).
    assert pretrained_accuracy > 0.80
    assert pretrained_accuracy - untrained_accuracy > 0.25


def test_the_nf4_twin_stays_close(model, features, digits):
    twin = nf4_twin(model)
    layers = [m for m in twin.blocks.modules() if isinstance(m, nn.Linear)]
    assert {type(layer).__name__ for layer in layers} == {"Linear4bit"}
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    cosine = feature_cosine(features, extract_features(twin, digits[0]))
    # Measured: 0.9977. Exactly 1 would mean that nothing was quantized.
    assert 0.99 < cosine < 0.9999


def test_the_shipped_file_keeps_its_number_of_classes(capsys):
    with pytest.raises(SystemExit):
        pretrain.parse_arguments(["--classes", "10"])
    assert "--output" in capsys.readouterr().err


def test_another_file_is_not_probed_alone(capsys):
    with pytest.raises(SystemExit):
        pretrain.parse_arguments(["--probe-only", "--output", "other.safetensors"])
    assert "leave out --output other.safetensors" in capsys.readouterr().err


def test_the_probe_sees_the_digits_as_a_trial_does():
    from PIL import Image

    images, labels = load_digits_images()
    digits = load_digits()
    assert np.array_equal(labels, digits.target)
    for index in (0, 777, 1796):
        grey = Image.fromarray(np.round(digits.images[index] * 255 / 16).astype(np.uint8))
        enlarged = np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC), np.float32)
        # To the rounding of two grey levels, as tests/tune_study/data/test_sources.py.
        assert np.abs(images[index].numpy() - (enlarged / 127.5 - 1)).max() <= 2 / 127.5 + 1e-6


def test_a_short_run_writes_weights_and_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "set_fused_attn", lambda _enable: None)
    threads = torch.get_num_threads()
    file = tmp_path / "tiny.safetensors"
    flags = ["--steps", "2", "--batch-size", "8", "--classes", "4", "--no-probe"]
    try:
        pretrain.main([*flags, "--output", str(file)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(file.with_suffix(".json").read_text())
    assert load_file(file)["head.weight"].shape == (4, 128)
    assert 0 <= written["glyph_accuracy"] <= 1
    assert written["images_seen"] == 16
    # A record is published: it must not carry the path it was written to.
    assert str(tmp_path) not in json.dumps(written)


def test_the_readme_tells_what_the_record_holds(record):
    text = README.read_text()
    assert record["command"] in text
    for figure in (f"{record['file_bytes']:,}", f"{record['parameters']:,}", record["machine"]):
        assert figure in text
    assert f"{record['duration_s']:,} s" in text
    assert f"{100 * record['glyph_accuracy']:.1f} %" in text
    assert f"{record['digits']['nf4_feature_cosine']:.4f}" in text
    assert record["digits"]["machine"] in text
    assert f"torch {record['digits']['libraries']['torch']}" in text
    columns = ("pretrained", "pretrained_nf4", "random_init", "raw_pixels")
    for size, row in record["digits"]["probe_accuracy_by_train_images"].items():
        cells = [f"{100 * row[c]['mean']:.1f} ± {100 * row[c]['std']:.1f}" for c in columns]
        assert re.search(rf"^\| {size} \| " + re.escape(" | ".join(cells)), text, re.MULTILINE)
