"""A training epoch, written down plainly: what ``train`` must equal to the last bit.

Each batch draws its crops and mirrors when its turn comes, what is watched goes into lists, and the
learning rate is transformers'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms.v2.functional import InterpolationMode, resize
from transformers import get_cosine_schedule_with_warmup

from tune_study.data.batches import augmentation
from tune_study.model.noise_scale import gradients_of_first_half
from tune_study.trial.train import autocast
from tune_study.trial.training import Training


class Epoch(NamedTuple):
    """What an epoch left: figures of its steps, and the sums that its row is made of."""

    watched: list[Tensor]
    """Per step: norm, loss, cosine with the gradient before, layers' norms, weights' norms."""
    noise: list[Tensor]
    """Per step whose parts are equal: S and |G|^2."""
    loss: float
    hits: int
    learning_rate: float


def schedule_of(training: Training, steps_per_epoch: int) -> LambdaLR:
    """transformers' own, on the trial's optimizer."""
    settings = training.config.training
    for group in training.optimizer.param_groups:
        group["lr"] = settings.learning_rate
    return get_cosine_schedule_with_warmup(
        training.optimizer, settings.warmup_steps, steps_per_epoch * settings.num_train_epochs
    )


def epoch(training: Training, schedule: LambdaLR) -> Epoch:
    """Trains one epoch on images in memory."""
    training.model.train()
    config, generator = training.config, training.generator
    split, policy = training.data.train, augmentation(config.dataset, config.data)
    watched: list[Tensor] = []
    noise: list[Tensor] = []
    losses, hits, rate, previous = [], [], 0.0, None
    for part in torch.randperm(len(split.labels), generator=generator).split(
        config.images_per_step
    ):
        images = augmented(split.images[part], policy, generator)
        rate = schedule.get_last_lr()[0]
        loss, correct, previous = _step(
            training, images, split.labels[part], previous, watched, noise
        )
        schedule.step()
        losses.append(loss * len(part))
        hits.append(correct)
    total = torch.stack(losses).double().sum()
    return Epoch(watched, noise, float(total), int(torch.stack(hits).sum()), rate)


def augmented(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Cropped and mirrored by what the generator draws now."""
    if how == "none":
        return images
    count, _, height, width = images.shape
    border = max(1, height // 8)
    offsets = torch.randint(0, 2 * border + 1, (2, count), generator=generator)
    rows = offsets[0, :, None] + torch.arange(height)
    columns = offsets[1, :, None] + torch.arange(width)
    padded = pad(images, (border,) * 4)
    cropped = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cropped = cropped.permute(0, 3, 1, 2)
    if how == "flip-crop":
        mirrored = torch.rand(count, generator=generator) < 0.5
        cropped = torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped)
    return cropped


def _pixels(training: Training, images: Tensor) -> Tensor:
    how = training.preprocessing
    side = [how.image_size, how.image_size]
    pixels = resize(images, side, InterpolationMode(how.interpolation)).float()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (how.mean, how.std))
    return pixels.sub_(mean).div_(std)


def _step(
    training: Training,
    images: Tensor,
    labels: Tensor,
    previous: tuple[Tensor, Tensor] | None,
    watched: list[Tensor],
    noise: list[Tensor],
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(mean loss, hits, this step's gradient and its norm)."""
    settings, parameters = training.config.training, list(training.parameters.values())
    micro = settings.per_device_train_batch_size
    watches = settings.gradient_noise_scale
    halves = watches and len(labels) <= micro
    losses, hits, squares, before = [], [], [], None
    for part, targets in zip(images.split(micro), labels.split(micro), strict=True):
        with gradients_of_first_half(halves) as first:
            with autocast(training):
                scores = training.model(_pixels(training, part))
            loss = cross_entropy(scores.float(), targets)
        share = loss * (len(targets) / len(labels))
        share.backward()
        now = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        if halves:
            zero = [torch.zeros_like(p) for p in parameters]
            half = [first.get(p, z) for p, z in zip(parameters, zero, strict=True)]
            squares += [4 * _square(some) for some in (half, torch._foreach_sub(now, half))]
        elif watches:
            gained = now if before is None else torch._foreach_sub(now, before)
            squares.append(_square(gained) / (len(targets) / len(labels)) ** 2)
        before = now
        losses.append(share.detach())
        hits.append((scores.argmax(-1) == targets).sum())
    step_loss = torch.stack(losses).sum()
    layers = torch.stack(torch._foreach_norm(now))
    weights = torch.stack(torch._foreach_norm([p.detach() for p in parameters]))
    norm, flat = torch.linalg.vector_norm(layers), torch.cat([g.flatten() for g in now])
    cosine = torch.full_like(norm, torch.nan)
    if previous is not None:
        cosine = torch.dot(flat, previous[0]) / (norm * previous[1])
    watched.append(torch.cat([torch.stack([norm, step_loss, cosine]), layers, weights]))
    sizes = [len(p) for p in (labels.tensor_split(2) if halves else labels.split(micro))]
    if watches and len(sizes) > 1 and len(set(sizes)) == 1:
        part, whole = torch.stack(squares).mean(), norm.square()
        square = (len(labels) * whole - sizes[0] * part) / (len(labels) - sizes[0])
        noise.append(torch.stack([(part - whole) / (1 / sizes[0] - 1 / len(labels)), square]))
    torch.nn.utils.clip_grads_with_norm_(parameters, settings.max_grad_norm, norm)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return step_loss, torch.stack(hits).sum(), (flat, norm)


def _square(gradient: Any) -> Tensor:
    return torch.stack(torch._foreach_norm(list(gradient))).square().sum()
