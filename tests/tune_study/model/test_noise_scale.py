"""The first half's gradients out of a whole batch's pass, against a pass over that half alone."""

from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import cross_entropy

from tune_study.config import parse_trial
from tune_study.model.build import build_model, trainable
from tune_study.model.noise_scale import NoiseScale, gradients_of_first_half, watch

SWIN = "swin_tiny_patch4_window7_224"
IMAGES = 6
STEPS = 600


def built(config, bf16=False):
    model = build_model(config, 10).model.train()
    torch.manual_seed(5)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)  # 0 before the first step
    for module in model.modules():
        if type(module).__name__ == "DropPath":  # Swin's, which draws per image
            module.eval()

    def loss_of(images):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return cross_entropy(model(images).float(), torch.arange(len(images)), reduction="sum")

    return trainable(model), loss_of


def both_ways(config, side, bf16=False):
    """{name: (from the whole pass, from a pass over the first half alone)}."""
    parameters, loss_of = built(config, bf16)
    images = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(1))
    loss_of(images[: IMAGES // 2]).backward()
    alone = {name: p.grad.clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    with gradients_of_first_half() as found:
        loss = loss_of(images)
    loss.backward()
    assert len(found) == len(parameters)
    return {name: (found[p], alone[name]) for name, p in parameters.items()}


def furthest(pairs):
    return max(float((a - b).norm() / b.norm()) for a, b in pairs.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_in_fp32_they_are_equal_to_rounding(mode, checkpointing, tiny):
    training = {"compute_dtype": "fp32", "gradient_checkpointing": checkpointing}
    config = tiny(mode, lora={"lora_dropout": 0.0}, training=training)
    assert furthest(both_ways(config, 32)) < 1e-4


def test_in_bf16_they_are_equal_to_its_rounding(tiny):
    config = tiny("nf4", lora={"lora_dropout": 0.0}, training={"compute_dtype": "bf16"})
    assert furthest(both_ways(config, 32, bf16=True)) < 0.03


def test_the_windows_of_a_swin_lie_image_by_image():
    values = {
        "model": SWIN,
        "dataset": "digits",
        "pretrained": False,
        "lora": {"lora_dropout": 0.0},
        "training": {"compute_dtype": "fp32"},
    }
    assert furthest(both_ways(parse_trial(values), 224)) < 1e-4


def test_nothing_is_left_outside(tiny):
    parameters, loss_of = built(tiny("none"), bf16=True)
    images = torch.randn(IMAGES, 3, 32, 32)
    with gradients_of_first_half() as found:
        pass
    loss_of(images).backward()
    with gradients_of_first_half(False) as unwanted:
        loss = loss_of(images)
    loss.backward()
    assert not found
    assert not unwanted
    assert all(p.grad is not None for p in parameters.values())


def end_step(scale, norm, sizes):
    scale.observe_step(norm, sizes)
    scale.keep(sizes)


def noise_scale_of(steps, parts, size, accumulate=True):
    """``NoiseScale`` over steps of ``parts`` x ``size`` images, whose gradients are known."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.zeros(50))
    truth = torch.full((50,), 0.5)  # |G|^2 = 12.5
    scale = NoiseScale({"w": weight}, steps=STEPS)
    for _ in range(steps):
        weight.grad = torch.zeros(50)
        for _ in range(parts):
            images = truth + 2 * torch.randn(size, 50, generator=generator)  # S = 4 x 50 = 200
            weight.grad = weight.grad + images.mean(0) / parts
            scale.observe_part(1 / parts)
        end_step(scale, weight.grad.norm(), [size] * parts)
    return scale.end_epoch()


@pytest.mark.parametrize(("parts", "size"), [(2, 16), (4, 4)])
def test_noise_scale_recovers_a_known_gradient_and_a_known_noise(parts, size):
    found = noise_scale_of(600, parts, size)
    assert found["gradient_square"] == pytest.approx(12.5, rel=0.05)
    assert found["gradient_noise_trace"] == pytest.approx(200, rel=0.05)
    assert found["gradient_noise_scale"] == pytest.approx(16, rel=0.1)


def test_noise_scale_of_one_step_is_the_formula():
    weight = nn.Parameter(torch.zeros(2))
    scale = NoiseScale({"w": weight}, steps=STEPS)
    small = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    weight.grad = small[0] / 2
    scale.observe_part(0.5)
    weight.grad = weight.grad + small[1] / 2
    scale.observe_part(0.5)
    end_step(scale, weight.grad.norm(), [4, 4])
    part, whole = (1 + 9) / 2, (0.25 + 2.25)
    found = scale.end_epoch()
    assert found["gradient_square"] == pytest.approx((8 * whole - 4 * part) / 4)
    assert found["gradient_noise_trace"] == pytest.approx((part - whole) / (1 / 4 - 1 / 8))


def test_noise_scale_of_unequal_parts_is_left_out():
    weight = nn.Parameter(torch.zeros(2))
    scale = NoiseScale({"w": weight}, steps=STEPS)
    for share in (0.6, 0.4):
        weight.grad = torch.ones(2)
        scale.observe_part(share)
    end_step(scale, torch.tensor(1.0), [3, 2])
    assert math.isnan(scale.end_epoch()["gradient_noise_scale"])


def test_halves_of_one_step_are_parts_of_half_its_images():
    """The first half added 1 and 0 to the mean gradient, the second 0 and 3."""
    weight, idle = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    scale = NoiseScale({"w": weight, "idle": idle}, steps=STEPS)
    weight.grad = torch.tensor([1.0, 3.0])
    scale.observe_halves({weight: torch.tensor([1.0, 0.0])})
    end_step(scale, weight.grad.norm(), [4, 4])
    part, whole = (4 * 1 + 4 * 9) / 2, 10
    found = scale.end_epoch()
    assert found["gradient_square"] == pytest.approx((8 * whole - 4 * part) / 4)
    assert found["gradient_noise_trace"] == pytest.approx((part - whole) / (1 / 4 - 1 / 8))


def test_an_epoch_is_the_mean_of_its_steps_and_the_next_begins_anew():
    weight = nn.Parameter(torch.zeros(1))
    scale = NoiseScale({"w": weight}, steps=STEPS)
    for first in (1.0, 1.0, 4.0):
        weight.grad = torch.tensor([first / 2])
        scale.observe_part(0.5)
        weight.grad = weight.grad + 1.5
        scale.observe_part(0.5)
        end_step(scale, weight.grad.norm(), [1, 1])
    squares = [2 * ((f + 3) / 2) ** 2 - (f**2 + 9) / 2 for f in (1, 1, 4)]
    traces = [2 * ((f**2 + 9) / 2 - ((f + 3) / 2) ** 2) for f in (1, 1, 4)]
    found = scale.end_epoch()
    assert found["gradient_square"] == pytest.approx(sum(squares) / 3)
    assert found["gradient_noise_trace"] == pytest.approx(sum(traces) / 3)
    assert found["gradient_noise_scale"] == pytest.approx(sum(traces) / sum(squares))
    assert all(math.isnan(value) for value in scale.end_epoch().values())


def test_no_scale_without_a_positive_square():
    weight = nn.Parameter(torch.zeros(1))
    scale = NoiseScale({"w": weight}, steps=STEPS)
    for now in (1.0, 0.0):
        weight.grad = torch.tensor([now])
        scale.observe_part(0.5)
    end_step(scale, weight.grad.norm(), [2, 2])
    found = scale.end_epoch()
    assert found["gradient_square"] == pytest.approx(-4)
    assert math.isnan(found["gradient_noise_scale"])


def test_a_single_part_is_left_out():
    weight = nn.Parameter(torch.zeros(1))
    scale = NoiseScale({"w": weight}, steps=STEPS)
    weight.grad = torch.ones(1)
    scale.observe_part(1.0)
    end_step(scale, weight.grad.norm(), [4])
    for now in (1.0, 2.0):
        weight.grad = torch.tensor([now])
        scale.observe_part(0.5)
    end_step(scale, weight.grad.norm(), [2, 2])
    assert scale.end_epoch()["gradient_square"] == pytest.approx(4)  # of the second step alone


def test_a_watched_layer_leaves_the_first_half_of_its_rows():
    layer = nn.Linear(3, 2)
    watch(layer)
    rows = torch.randn(5, 3)
    with gradients_of_first_half() as found:
        loss = layer(rows).square().sum()
    loss.backward()
    alone = nn.Linear(3, 2)
    alone.load_state_dict(layer.state_dict())
    alone(rows[:2]).square().sum().backward()
    torch.testing.assert_close(found[layer.weight], alone.weight.grad)
    torch.testing.assert_close(found[layer.bias], alone.bias.grad)
