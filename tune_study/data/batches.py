"""Batches on the device: preprocessed as the model wants it, augmented."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import InterpolationMode, resize

from tune_study.config import DataConfig
from tune_study.data.mapped import Mapped
from tune_study.data.place import Preprocessing
from tune_study.data.sources import Split


def normalisation(how: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels in grey levels, [1, 3, 1, 1] on ``device``."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1) * 255
        for values in (how.mean, how.std)
    )
    return mean, std


def preprocess(
    images: Tensor, how: Preprocessing, constants: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """uint8 [B, 3, H, W] on any device -> float32 [B, 3, image_size, image_size], normalised.

    Resized as torchvision does it on the CPU, to whole grey levels after each direction: what
    Pillow makes of one image at a time, and thus what timm's weights were trained on, to two levels
    of 255. In both directions at once, as torchvision does it on other devices, overshooting edges
    would be cut off by other amounts. ``constants`` are those of ``normalisation``, made before.
    """
    side, interpolation = how.image_size, InterpolationMode(how.interpolation)
    if images.device.type != "cpu":
        images = resize(images, [images.shape[-2], side], interpolation)
    pixels = resize(images, [side, side], interpolation).float()
    mean, std = constants or normalisation(how, images.device)
    return pixels.sub_(mean).div_(std)


def draw_plan(
    count: int, batch_size: int, how: str, height: int, generator: torch.Generator
) -> Tensor:
    """An epoch of ``count`` images, drawn up front: int64 [4, count].

    Which image; top and left of its crop, in the padded image; whether it is mirrored (1) or not.
    The order comes first, then batch by batch the crops and the mirrors: so a seed's images are
    those of a study whose batches drew their own. The CPU ``generator`` draws the same for every
    device.
    """
    order = torch.randperm(count, generator=generator)
    draws = [
        draw_augmentation(len(part), how, height, generator) for part in order.split(batch_size)
    ]
    return torch.cat([order[None], torch.cat(draws, dim=1)])


def draw_augmentation(count: int, how: str, height: int, generator: torch.Generator) -> Tensor:
    """The part of a plan that is drawn batch by batch: int64 [3, count]."""
    draws = torch.zeros(3, count, dtype=torch.int64)
    if how != "none":
        places = 2 * _border(height) + 1
        draws[:2] = torch.randint(0, places, (2, count), generator=generator)
    if how == "flip-crop":
        draws[2] = torch.rand(count, generator=generator) < 0.5
    return draws


def _border(height: int) -> int:
    """Pixels around an image before it is cropped: an eighth of its height."""
    return max(1, height // 8)


def augment(images: Tensor, how: str, draws: Tensor) -> Tensor:
    """A crop after padding by an eighth, and for ``flip-crop`` a mirror image where one was drawn.

    uint8 [B, 3, H, W] to the same shape; ``draws`` int64 [3, B] on the same device, as the last
    three rows of a plan.
    """
    if how == "none":
        return images
    top, left, mirrored = draws
    count, _, height, width = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    padded = pad(images, (_border(height),) * 4)
    batch = torch.arange(count, device=images.device)
    # Advanced indices around the channel slice put the channel last: [B, H, W, 3].
    cropped = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cropped = cropped.permute(0, 3, 1, 2)
    if how == "flip-crop":
        cropped = torch.where(mirrored.bool()[:, None, None, None], cropped.flip(-1), cropped)
    return cropped


def augmentation(dataset: str, config: DataConfig) -> str:
    """The augmentation that ``auto`` stands for; none where a function of the user's is named."""
    if config.transform is not None:
        return "none"
    if config.augment != "auto":
        return config.augment
    return "flip-crop" if dataset in ("cifar10", "cifar100") else "crop"


def planned(
    split: Split, batch_size: int, policy: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """One epoch in a random order, as ``make_batch`` takes it: (part of the plan, images).

    The plan is drawn and brought to the device at once. Images are uint8 [B, 3, H, W] on the device
    where they come from a file; ``None`` where all are there already. The last, smaller batch is
    included.
    """
    images = split.images
    plan = draw_plan(len(split.labels), batch_size, policy, images.shape[-2], generator)
    parts = plan.to(split.labels.device).split(batch_size, dim=1)
    if isinstance(images, Mapped):
        return zip(parts, images.batches(plan[0].split(batch_size)), strict=True)
    return zip(parts, itertools.repeat(None), strict=False)


def make_batch(
    split: Split, part: Tensor, images: Tensor | None, policy: str
) -> tuple[Tensor, Tensor]:
    """What is ``planned``, augmented: (uint8 [B, 3, H, W], int64 [B]) on the device."""
    which = part[0]
    if images is None:
        images = cast(Tensor, split.images)[which]
    return augment(images, policy, part[1:]), split.labels[which]


def train_batches(
    split: Split, batch_size: int, policy: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch: what is ``planned``, made."""
    for part, images in planned(split, batch_size, policy, generator):
        yield make_batch(split, part, images, policy)


def eval_batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, not augmented; types as of ``make_batch``."""
    images = split.images
    if isinstance(images, Mapped):
        parts = images.batches(torch.arange(len(split.labels)).split(batch_size))
    else:
        parts = iter(images.split(batch_size))
    return zip(parts, split.labels.split(batch_size), strict=True)
