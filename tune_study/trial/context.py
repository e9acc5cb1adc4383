"""Where a trial runs and how: records alone, without torch and Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from search_spaces.own_code import Code
from tune_study.config import TrialConfig, parse_assignment
from tune_study.data.place import Place
from tune_study.errors import UserError
from tune_study.folder.schema import MODES

Keep = Literal["all", "best", "none"]
"""What stays of the checkpoints of a trial that ended well."""

Report = Callable[[dict[str, Any]], None]


class Simulation(BaseModel):
    """What is planted, and the seeds' deviation.

    ``effects`` are differences in accuracy, by mode (``nf4``) or by mode and level of an axis
    (``nf4@training.learning_rate=0.01``, the value as JSON).
    """

    model_config = ConfigDict(frozen=True)

    effects: dict[str, float] = {}
    seed_sd: float = 0.004

    def effect(self, config: TrialConfig) -> float:
        """All that is planted in one trial, added up: by its mode, and by mode and level."""
        return sum((size for key, size in self.effects.items() if _concerns(key, config)), 0.0)

    def of_no_trial(self, trials: Sequence[TrialConfig]) -> list[str]:
        """The effects by level that are planted in none of ``trials``."""
        return [
            key
            for key in self.effects
            if "@" in key and not any(_concerns(key, trial) for trial in trials)
        ]


def _concerns(key: str, config: TrialConfig) -> bool:
    """Whether the trial has the mode, and the level if one is named, of an effect."""
    mode, at, level = key.partition("@")
    if mode != config.quantization.mode or not at:
        return mode == config.quantization.mode
    field, _, text = level.partition("=")
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return bool(_plain(value) == json.loads(text))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parse_effect(text: str) -> tuple[str, float]:
    """``"nf4=-0.01"`` -> ``("nf4", -0.01)``; with ``@FIELD=VALUE`` after it, at that level alone.

    The key is that of ``Simulation.effects``. Raises ``UserError``.
    """
    planted, at, level = text.partition("@")
    mode, _, value = planted.partition("=")
    try:
        effect = float(value)
    except ValueError:
        effect = math.nan
    if mode not in MODES or mode == "none" or not abs(effect) < 1:
        raise UserError(
            f"--effect {text}: write it as MODE=DIFFERENCE with a mode of {', '.join(MODES[1:])} "
            "and a difference in accuracy between -1 and 1, e.g. nf4=-0.01, or for one level of an "
            "axis nf4=-0.01@training.learning_rate=0.001"
        )
    return (f"{mode}@{_level(text, level)}" if at else mode), effect


def _level(text: str, level: str) -> str:
    """``FIELD=VALUE`` with the value as JSON, so that 1e-3 and 0.001 are one level."""
    field, value = parse_assignment(level, f"--effect {text.partition('@')[0]}@")
    if field == "seed" or field.startswith("quantization"):
        raise UserError(
            f"--effect {text}: {field} is no axis that a mode's effect can depend on; name a field "
            "of the configuration, e.g. training.learning_rate"
        )
    try:
        return f"{field}={json.dumps(value, allow_nan=False)}"
    except (TypeError, ValueError):  # a date, a set, an infinity
        raise UserError(f"--effect {text}: no trial can have this value of {field}") from None


class RunContext(BaseModel):
    """Where a trial runs: all that a worker needs and that does not decide the result."""

    model_config = ConfigDict(frozen=True)

    study_dir: Path
    data_dir: Path | None = None
    cache_dir: Path | None = None
    leave_out_broken: bool = False
    weights: Path | None = None
    code: Code | None = None
    """The user's own file, whose models, images and transforms the trials may have."""
    device: str = "cpu"
    num_threads: int = 1
    trials_on_device: int = 1
    """At a time, at most: what a device counts is a trial's own where it is alone."""
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

    @property
    def place(self) -> Place:
        """Where this machine has images."""
        return Place(self.data_dir, self.cache_dir, self.leave_out_broken, self.code)
