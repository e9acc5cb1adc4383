"""PEFT and bitsandbytes as their documentation shows them: a model and a step of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy


def side_of(name: str) -> int:
    """Pixels of the model's images, as timm has them."""
    return timm.get_pretrained_cfg(name).input_size[-1]


def plain_model(name: str, mode: str, device: str) -> nn.Module:
    """timm, bitsandbytes' layers with their defaults, PEFT's LoRA."""
    model = timm.create_model(name, pretrained=False, num_classes=10)
    if mode != "none":
        for block in model.blocks:
            for parent, child in (
                (block.attn, "qkv"),
                (block.attn, "proj"),
                (block.mlp, "fc1"),
                (block.mlp, "fc2"),
            ):
                linear = getattr(parent, child)
                shape = linear.in_features, linear.out_features
                if mode == "int8":
                    layer: Any = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
                else:
                    layer = bnb.nn.LinearNF4(*shape)
                layer.load_state_dict(linear.state_dict())
                setattr(parent, child, layer)
        setattr(model, "is_loaded_in_8bit" if mode == "int8" else "is_loaded_in_4bit", True)
    model.requires_grad_(False)
    targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets, modules_to_save=["head"]
    )
    return get_peft_model(model.to(device), lora).to(device)


def plain_step(
    name: str, mode: str, batch: int, device: str, dtype: str, *, captured: bool = False
) -> Callable[[], None]:
    """Forward, backward and optimizer on one fixed batch; ``captured``: such as a graph takes."""
    model = plain_model(name, mode, device).train()
    pixels = torch.randn(batch, 3, side_of(name), side_of(name), device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    learning = [p for p in model.parameters() if p.requires_grad]
    more = {"fused": True, "capturable": True} if captured else {}
    optimizer = torch.optim.AdamW(learning, lr=1e-4, **more)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            scores = model(pixels)
        cross_entropy(scores.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph, as torch's notes on graphs show it: its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
