"""Images in a file, of which memory holds what is asked for."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tune_study.machine.device import free_bytes
from tune_study.machine.gpus import SHARE_OF_DEVICE

RESIDENT_BYTES = 64 * 2**20
"""Pages of the file that were read stay with the system's cache, but not in this process."""


class Mapped:
    """Some of the images in a file of uint8 [N, 3, side, side]: what a tensor of them would be.

    A slice or an index makes a tensor on ``device``.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        rows: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.path = path
        self.whole = shape
        """Of all images in the file."""
        self.device = device or torch.device("cpu")
        self.rows = torch.arange(shape[0]) if rows is None else rows
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # nothing writes to it
            warnings.filterwarnings("ignore", message=".*not writable")
            flat = torch.from_numpy(np.frombuffer(self._map, np.uint8))
        self._pixels = flat[: math.prod(shape)].view(self.whole)
        self._touched = 0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.whole[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Mapped:
        return Mapped(self.path, self.whole, self.rows[rows], self.device)

    def to(self, device: torch.device) -> Tensor | Mapped:
        """On the device where they are small beside its free memory, else still in the file."""
        free = free_bytes(device)
        if device.type == "cpu" or free is None or self._bytes() > free * SHARE_OF_DEVICE:
            return Mapped(self.path, self.whole, self.rows, device)
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        step = max(1, RESIDENT_BYTES // math.prod(self.whole[1:]))
        for start in range(0, len(self), step):
            images[start : start + step] = self._read(torch.arange(len(self))[start : start + step])
        return images

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        return self._read(torch.arange(len(self))[which]).to(self.device)

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images at each of ``parts``, on the device; the next are read beside the step."""
        with ThreadPoolExecutor(1, "images") as reader:
            upcoming = None
            for part in [*parts, None]:
                ready = upcoming
                upcoming = None if part is None else reader.submit(self._read, part.cpu())
                if ready is not None:
                    # From pinned memory the copy, too, runs beside the step.
                    yield ready.result().to(self.device, non_blocking=True)

    def _bytes(self) -> int:
        return math.prod(self.shape)

    def _read(self, which: Tensor) -> Tensor:
        rows = self.rows[which]
        pinned = self.device.type == "cuda"
        images = torch.empty((len(rows), *self.whole[1:]), dtype=torch.uint8, pin_memory=pinned)
        torch.index_select(self._pixels, 0, rows, out=images)
        self._touched += images.nbytes
        if self._touched > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return images
