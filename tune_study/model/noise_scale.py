"""The gradients of a batch's first half of images, from the backward pass of the whole batch.

What the gradient noise scale compares. A second pass, or two over halves, would draw other dropout
masks and be slower; here a layer that learns multiplies the first half of its rows once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Gradients = dict[Tensor, Tensor]
"""By the parameter itself."""
_receiver: Gradients | None = None


@contextmanager
def gradients_of_first_half(wanted: bool = True) -> Iterator[Gradients]:
    """What is computed forward within also leaves, in backward, the gradients that the first half
    of the batch adds to those of the parameters: LoRA's (``lora.py``) and a watched layer's.
    """
    global _receiver
    found: Gradients = {}
    _receiver = found if wanted else None
    try:
        yield found
    finally:
        _receiver = None


def receiver() -> Gradients | None:
    """Where the gradients of the forward pass that runs now belong; ``None``: nowhere."""
    return _receiver


def watch(layer: nn.Linear) -> None:
    """Makes an ``nn.Linear`` that learns, with rows [images, in_features], leave its own."""
    layer.register_forward_hook(_after_forward)


def _after_forward(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    found = receiver()
    if found is None or not output.requires_grad:
        return
    weight, bias, rows = layer.weight, layer.bias, inputs[0].detach()
    assert isinstance(weight, Tensor)

    def in_backward(gradient: Tensor) -> None:
        half = len(gradient) // 2
        of_weight = gradient[:half].T @ rows[:half].to(gradient.dtype)
        found[weight] = of_weight.to(weight.dtype)
        if isinstance(bias, Tensor):
            found[bias] = gradient[:half].sum(0).to(bias.dtype)

    output.register_hook(in_backward)
