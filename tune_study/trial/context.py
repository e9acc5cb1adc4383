"""Where a trial runs and how: records alone, without torch and Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tune_study.errors import UserError
from tune_study.folder.schema import MODES

Keep = Literal["all", "best", "none"]
"""What stays of the checkpoints of a trial that ended well."""

Report = Callable[[dict[str, Any]], None]


class Simulation(BaseModel):
    """What is planted: the effect of each mode on the accuracy, and the seeds' deviation."""

    model_config = ConfigDict(frozen=True)

    effects: dict[str, float] = {}
    seed_sd: float = 0.004


def parse_effect(text: str) -> tuple[str, float]:
    """``"nf4=-0.01"`` -> ``("nf4", -0.01)``. Raises ``UserError``."""
    mode, _, value = text.partition("=")
    try:
        effect = float(value)
    except ValueError:
        effect = math.nan
    if mode not in MODES or mode == "none" or not abs(effect) < 1:
        raise UserError(
            f"--effect {text}: write it as MODE=DIFFERENCE with a mode of {', '.join(MODES[1:])} "
            "and a difference in accuracy between -1 and 1, e.g. nf4=-0.01"
        )
    return mode, effect


class RunContext(BaseModel):
    """Where a trial runs: all that a worker needs and that does not decide the result."""

    model_config = ConfigDict(frozen=True)

    study_dir: Path
    data_dir: Path | None = None
    weights: Path | None = None
    device: str = "cpu"
    num_threads: int = 1
    simulation: Simulation | None = None
    """Draws the trials instead of training them."""
    keep_checkpoints: Keep = "best"
    """Of a trial that ended well: every epoch's, its best adapter, or nothing."""
    storage: str | None = None
    """URI of the study's folder in a store, where all that a trial leaves goes."""
    on_cluster: bool = False
    """Trials run on nodes that share no folder with the driver: ``study_dir`` is the driver's."""
    epoch_s: float = 0.0
    """How long an epoch of a simulated trial lasts."""
