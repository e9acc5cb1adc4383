"""Batches on the device: preprocessed as the model wants it, augmented."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import InterpolationMode, resize

from tune_study.config import DataConfig
from tune_study.data.mapped import Mapped
from tune_study.data.place import Preprocessing
from tune_study.data.sources import Split


def preprocess(images: Tensor, how: Preprocessing) -> Tensor:
    """uint8 [B, 3, H, W] on any device -> float32 [B, 3, image_size, image_size], normalised.

    Resized as torchvision does it on the CPU, to whole grey levels after each direction: what
    Pillow makes of one image at a time, and thus what timm's weights were trained on, to two levels
    of 255. In both directions at once, as torchvision does it on other devices, overshooting edges
    would be cut off by other amounts.
    """
    side, interpolation = how.image_size, InterpolationMode(how.interpolation)
    if images.device.type != "cpu":
        images = resize(images, [images.shape[-2], side], interpolation)
    pixels = resize(images, [side, side], interpolation).float()
    mean = torch.tensor(how.mean, device=images.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(how.std, device=images.device).view(1, -1, 1, 1) * 255
    return pixels.sub_(mean).div_(std)


def augment(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Random crop after padding by an eighth, and for ``flip-crop`` a random mirror image.

    uint8 [B, 3, H, W] to the same shape. The draws come from the CPU ``generator``, so that they
    are the same on every device.
    """
    if how == "none":
        return images
    count, _, height, width = images.shape
    border = max(1, height // 8)
    offsets = torch.randint(0, 2 * border + 1, (2, count), generator=generator)
    rows = (offsets[0, :, None] + torch.arange(height)).to(images.device)
    columns = (offsets[1, :, None] + torch.arange(width)).to(images.device)
    padded = pad(images, (border,) * 4)
    batch = torch.arange(count, device=images.device)
    # Advanced indices around the channel slice put the channel last: [B, H, W, 3].
    cropped = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cropped = cropped.permute(0, 3, 1, 2)
    if how == "flip-crop":
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        cropped = torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped)
    return cropped


def augmentation(dataset: str, config: DataConfig) -> str:
    """The augmentation that ``auto`` stands for."""
    if config.augment != "auto":
        return config.augment
    return "flip-crop" if dataset in ("cifar10", "cifar100") else "crop"


def train_batches(
    split: Split, batch_size: int, policy: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a random order, augmented: (uint8 [B, 3, H, W], int64 [B]) on the device.

    The last, smaller batch is included.
    """
    order = torch.randperm(len(split.labels), generator=generator)
    for images, labels in _chosen(split, order.split(batch_size)):
        yield augment(images, policy, generator), labels


def eval_batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, not augmented; types as in ``train_batches``."""
    if isinstance(split.images, Mapped):
        yield from _chosen(split, torch.arange(len(split.labels)).split(batch_size))
    else:
        yield from zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)


def _chosen(split: Split, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels at each of ``parts``."""
    labels = (split.labels[part.to(split.labels.device)] for part in parts)
    if isinstance(split.images, Mapped):
        return zip(split.images.batches(parts), labels, strict=True)
    images = split.images
    return zip((images[part.to(images.device)] for part in parts), labels, strict=True)
