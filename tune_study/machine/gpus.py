"""A GPU, and what trials take of one: without torch, which a look at a node does not need."""

from __future__ import annotations

from typing import NamedTuple

SHARE_OF_DEVICE = 0.25
"""Of a device's free memory: images that take no more lie there, others come batch by batch."""


class Card(NamedTuple):
    """A GPU."""

    name: str
    memory_bytes: int


class Need(NamedTuple):
    """What the process of a trial takes of a GPU at most, whichever trial of a plan it is."""

    step_bytes: int | None
    """Without the images; ``None`` where it can't be predicted."""
    image_bytes: int
    """Of all images, where they lie on the device."""


def count() -> int:
    """GPUs of this machine that CUDA has."""
    import torch

    return torch.cuda.device_count()


def smallest(device: str) -> Card | None:
    """This machine's GPU, of several the one with the least memory; ``None`` but on CUDA."""
    if device != "cuda":
        return None
    import torch

    every = [torch.cuda.get_device_properties(number) for number in range(count())]
    least = min(every, key=lambda found: found.total_memory)
    return Card(least.name, least.total_memory)
