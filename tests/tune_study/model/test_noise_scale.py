"""The first half's gradients out of a whole batch's pass, against a pass over that half alone."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import cross_entropy

from tune_study.config import parse_trial
from tune_study.first_half import gradients_of_first_half
from tune_study.model import build_model, trainable

SWIN = "swin_tiny_patch4_window7_224"
IMAGES = 6


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
    parameters, loss_of = built(tiny("none"))
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
