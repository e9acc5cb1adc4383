"""Where images come from and are kept, and how a model wants them: records alone, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from search_spaces.own_code import Code
from tune_study.errors import UserError


class Place(NamedTuple):
    """Where this machine has images."""

    data_dir: Path | None = None
    """Of CIFAR; ``None`` downloads it once."""
    cache_dir: Path | None = None
    """Downloads and decoded images; ``None`` is the user's own cache."""
    leave_out_broken: bool = False
    """Whether a folder's images that cannot be read are left out, instead of refused."""
    code: Code | None = None
    """The user's own file, whose functions ``code:`` means."""

    def cache(self) -> Path:
        """The folder of what can be made again. Raises ``UserError`` where there is no home."""
        if self.cache_dir is not None:
            return self.cache_dir
        if base := os.environ.get("XDG_CACHE_HOME"):
            return Path(base) / "tune-study"
        try:
            return Path.home() / ".cache" / "tune-study"
        except RuntimeError:
            raise UserError("--cache-dir: this user has no home folder; name one") from None


class Preprocessing(NamedTuple):
    """What the model wants: side in pixels, timm's interpolation, mean and std per channel."""

    image_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
