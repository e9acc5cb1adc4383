"""timm's training script, as far as it trains: a peer of ``benchmarks/peers.py``.

timm's package does not hold its ``train.py``. What that does in an epoch is written down here with
timm's own loader and optimizer, for ``--amp --amp-dtype bfloat16 --opt adamw`` and its defaults
otherwise: its augmentation, label smoothing of 0.1, one backward pass a step, no scaler in bf16.
All weights train there, none is quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.data import create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2


class Pictures(torch.utils.data.Dataset):
    """(PIL image, label) pairs; the loader sets ``transform``."""

    def __init__(self, pairs: list[tuple[Any, int]]) -> None:
        self.pairs = pairs
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.pairs[index]
        return (image if self.transform is None else self.transform(image)), label


def epoch_of(
    name: str, pairs: list[tuple[Any, int]], batch: int, device: str, workers: int
) -> Callable[[], None]:
    """One epoch over ``pairs``."""
    where = torch.device(device)
    model = timm.create_model(name, pretrained=False, num_classes=10).to(where)
    wanted = resolve_data_config({}, model=model)
    loader = create_loader(
        Pictures(pairs),
        input_size=wanted["input_size"],
        batch_size=batch,
        is_training=True,
        interpolation="random",
        mean=wanted["mean"],
        std=wanted["std"],
        num_workers=workers,
        pin_memory=device == "cuda",
        device=where,
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.01)
    smoothed = LabelSmoothingCrossEntropy(smoothing=0.1)

    def epoch() -> None:
        model.train()
        for images, labels in loader:
            with torch.autocast(device, torch.bfloat16):
                loss = smoothed(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch
