"""A function of the user's in the place of an augmentation: ``data.augment=code:FUNCTION``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from search_spaces import own_code
from search_spaces.own_code import Code
from tune_study.config import TrialConfig
from tune_study.errors import UserError, first_line

Function = Callable[[Tensor, torch.Generator], Tensor]
Transform = Callable[[Tensor, int, int], Tensor]
"""(uint8 [B, 3, H, W], epoch, step in it) -> uint8 of the same shape, on the same device."""
DARK = 4.0
"""Of 255: images whose brightest value is no more were scaled to 0..1, or normalised."""


def transform_of(config: TrialConfig, code: Code | None) -> Transform | None:
    """What ``data.augment`` names of the user's file; ``None`` of an augmentation of ours.

    Raises ``UserError`` where there is no such function.
    """
    name = config.data.transform
    if name is None:
        return None
    setting = f"data.augment = {config.data.augment}"
    function = own_code.function_of(setting, name, code)
    return partial(_transformed, setting, function, config.seed)


def try_out(config: TrialConfig, code: Code | None, images: Tensor) -> None:
    """Calls the function on ``images``. Raises ``UserError`` where it fails or does not fit."""
    transform = transform_of(config, code)
    if transform is None:
        return
    try:
        transform(images.clone(), 1, 0)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"data.augment = {config.data.augment}: it fails on uint8 {list(images.shape)} "
            f"({type(error).__name__}: {first_line(error)[:300]}); correct it"
        ) from error


def _transformed(
    setting: str, function: Function, seed: int, images: Tensor, epoch: int, step: int
) -> Tensor:
    """Drawn by seed, epoch and step alone: a trial that goes on draws what it would have drawn.

    The generator is the CPU's, which draws the same for every device. Raises ``UserError`` for what
    are no such images.
    """
    drawn = hashlib.sha256(f"{seed} {epoch} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:4], "big"))
    first = step == 0  # reads the device, as no later step does
    bright = first and float(images.amax()) > DARK
    with torch.no_grad():
        found = function(images, generator)
    if not isinstance(found, Tensor) or _kind(found)[1:] != _kind(images)[1:]:
        raise _refused(setting, images, found)
    if found.dtype == torch.uint8:
        return found
    if not found.is_floating_point():
        raise _refused(setting, images, found)
    if bright and not float(found.amax()) > DARK:
        low, high = float(found.amin()), float(found.amax())
        raise UserError(
            f"{setting}: it made values from {low:.3g} to {high:.3g}; return them in 0..255, which "
            "the trial normalises itself"
        )
    return found.round().clamp(0, 255).to(torch.uint8)


def _kind(images: Tensor) -> tuple[str, list[int], str]:
    return str(images.dtype).removeprefix("torch."), list(images.shape), images.device.type


def _refused(setting: str, images: Tensor, found: object) -> UserError:
    made = type(found).__name__
    if isinstance(found, Tensor):
        made = "{} {} on {}".format(*_kind(found))
    wanted = "{} {} on {}".format(*_kind(images))
    return UserError(
        f"{setting}: it made {made} of {wanted}; return a tensor of the same shape on the same "
        "device, of uint8 or of floats in 0..255"
    )
